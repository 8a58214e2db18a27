// See settings.h.
#include "settings.h"

#include <atomic>

namespace fusedrnn {
namespace {
std::atomic<AskSettings> asked{nullptr};
}  // namespace

void ask_settings(AskSettings ask) { asked = ask; }

Settings settings() {
  const AskSettings ask = asked;
  if (!ask) return {};
  int told = 0;
  ask(&told);
  return {(told & 1) != 0, (told & 2) != 0};
}

}  // namespace fusedrnn
