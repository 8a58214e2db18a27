// Which way a GPU computes a kind of call sooner: step by step (loop.h), or many steps in one kernel (persistent/).
// Measured at the first call of the kind, on its own data, and kept: in memory, and in a file of the user's for later
// processes. Nothing here knows a GPU: who asks brings the measurement.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../problem.h"

namespace fusedrnn {

enum class Way { kStepwise, kPersistent };

// A measurement of one call. Each way has results of its own.
struct Trial {
  std::function<bool()> begin;          // false: there is no memory for results beside the call's own
  std::function<std::string(Way)> run;  // the whole call, waited for; empty, or why it failed
  std::function<double(Way)> seconds;   // of a call
  // Between both ways' results, over the one that is allowed; none where the stepwise ones are not finite.
  std::function<std::optional<double>()> deviation;
};

struct Choice {
  Way way = Way::kStepwise;
  double seconds[2] = {0, 0};  // of each way
  std::string failure;         // of the persistent way, which is never taken then; else empty
};

class Choices {
 public:
  // file: kept there, if it has a name. machine: GPU, driver and libraries; what the file has of others is not read.
  Choices(std::string file, std::string machine);

  // The way for a call of this kind. Without a trial, for a call that cannot wait: the one that is known, or stepwise.
  Way choose(const std::string& kind, const Trial* trial);

  std::map<std::string, Choice> known() const;
  // Failures of the persistent way, each told once.
  std::vector<std::string> take_remarks();

 private:
  void read();
  void keep(const std::string& kind, const Choice& choice);
  void write(const std::string& kind, const Choice& choice);
  Way unmeasured(const std::string& kind);
  static void debug(const std::string& text);

  const std::string file_, machine_;
  bool writes_ = true;        // to the file, unless it is another's
  bool ends_line_ = true;     // the file's last line is complete
  mutable std::mutex mutex_;  // of all below
  std::map<std::string, Choice> known_;
  std::map<std::string, int> attempts_;  // that came to nothing
  std::vector<std::string> remarks_;
  std::mutex trials_;  // one at a time: two would disturb one another
};

// The shared library that this is in, as it was built: another build may take other times.
std::string this_library();

// The file of this user: $XDG_CACHE_HOME/fusedrnn/choices.txt, or below ~/.cache; empty: there is no such folder.
std::string choices_file();

// The kind of a pass over a layer: what its time depends on, with T and B rounded up to powers of two. tf32: whether
// its float32 products round to TF32. what: "forward", say.
std::string kind_of(const char* cell, DType dtype, bool tf32, const LayerSizes& z, const char* what);

}  // namespace fusedrnn
