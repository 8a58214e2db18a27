// See choice.h.
#include "choice.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <utility>

namespace fusedrnn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kHeader = "fusedrnn choices 1";
constexpr std::uintmax_t kMostBytes = 1 << 20;  // of a file that is read
constexpr int kTrials = 5;                      // of which the least counts
constexpr int kAttempts = 3;                    // that come to nothing, before a process makes no more
const char* const kNames[] = {"stepwise", "persistent"};

// A field of a line, whatever it holds.
std::string field(std::string text) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c == '\t' || c == '\n' || c == '\r'; }, ' ');
  return text;
}

std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> fields(1);
  for (const char c : line) {
    if (c == '\t') {
      fields.emplace_back();
    } else {
      fields.back() += c;
    }
  }
  return fields;
}

bool read_seconds(const std::string& text, double& into) {
  char* end = nullptr;
  into = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && std::isfinite(into) && into >= 0;
}

// A line: machine, kind, way, seconds of each way, failure.
bool read_line(const std::string& line, std::string& machine, std::string& kind, Choice& choice) {
  const std::vector<std::string> fields = fields_of(line);
  if (fields.size() != 6 || fields[1].empty()) return false;
  const auto* const way = std::find(std::begin(kNames), std::end(kNames), fields[2]);
  if (way == std::end(kNames)) return false;
  machine = fields[0], kind = fields[1];
  choice.way = static_cast<Way>(way - kNames);
  choice.failure = fields[5];
  const bool sound = choice.failure.empty() || choice.way == Way::kStepwise;
  return sound && read_seconds(fields[3], choice.seconds[0]) && read_seconds(fields[4], choice.seconds[1]);
}

std::string line_of(const std::string& machine, const std::string& kind, const Choice& choice) {
  std::ostringstream line;
  line << machine << '\t' << kind << '\t' << kNames[static_cast<int>(choice.way)] << '\t' << choice.seconds[0] << '\t'
       << choice.seconds[1] << '\t' << field(choice.failure) << '\n';
  return line.str();
}

}  // namespace

Choices::Choices(std::string file, std::string machine) : file_(std::move(file)), machine_(field(std::move(machine))) {
  if (!file_.empty()) read();
}

// What is wrong with the file changes no result: whoever looks for it is told.
void Choices::debug(const std::string& text) {
  const char* wish = std::getenv("FUSEDRNN_DEBUG");
  if (wish && *wish) std::cerr << "fusedrnn: " << text << std::endl;
}

void Choices::read() {
  std::error_code error;
  const fs::file_status status = fs::status(file_, error);
  if (status.type() == fs::file_type::not_found) return;
  const bool regular = fs::is_regular_file(status);  // a pipe would wait for a writer
  std::ifstream in;
  std::string line;
  const auto is_ours = [&] {
    std::string first(std::strlen(kHeader) + 1, ' ');
    return static_cast<bool>(in.read(first.data(), static_cast<std::streamsize>(first.size()))) &&
           first == std::string(kHeader) + '\n';
  };
  if (regular) in.open(file_);
  if (!in.is_open() || (fs::file_size(file_, error) > 0 && !is_ours())) {
    writes_ = false;
    debug(file_ + " is not a file of choices that can be read: ignored");
    return;
  }
  if (fs::file_size(file_, error) > kMostBytes) {
    debug(file_ + " has grown beyond " + std::to_string(kMostBytes) + " bytes: it begins anew");
    return;
  }
  int wrong = 0;
  while (std::getline(in, line)) {
    std::string machine, kind;
    Choice choice;
    if (line == kHeader) {
      // of a process that began the file at the same time
    } else if (!read_line(line, machine, kind, choice)) {
      ++wrong;
    } else if (machine == machine_) {
      known_[kind] = choice;  // of several the last
    }
    ends_line_ = !in.eof();
  }
  if (wrong > 0) debug(file_ + ": " + std::to_string(wrong) + " line(s) that are no choices: ignored");
}

void Choices::keep(const std::string& kind, const Choice& choice) {
  const std::lock_guard<std::mutex> lock(mutex_);
  known_[kind] = choice;
  if (!choice.failure.empty()) {
    remarks_.push_back("kernels for many steps (" + kind + ") failed on " + machine_ +
                       " and are not used for such calls: " + choice.failure +
                       ". Please report this with the output of python -m fusedrnn.info");
  }
  if (!file_.empty() && writes_) write(kind, choice);
}

// At the end of the file; a file that has grown too large begins anew, with what is known of this machine.
void Choices::write(const std::string& kind, const Choice& choice) {
  std::error_code error;
  const fs::path path(file_);
  if (!fs::exists(path.parent_path(), error)) fs::create_directories(path.parent_path(), error);
  const bool there = fs::exists(path, error);
  std::string text = line_of(machine_, kind, choice);
  const bool full = there && fs::file_size(path, error) + text.size() > kMostBytes;
  if (full) {
    text.clear();
    for (const auto& [own, known] : known_) text += line_of(machine_, own, known);
  }
  if (full || !there || fs::file_size(path, error) == 0) text = std::string(kHeader) + '\n' + text;
  else if (!ends_line_) text = '\n' + text;
  ends_line_ = true;
  std::ofstream out(file_, full ? std::ios::trunc : std::ios::app);
  if (out) out.write(text.data(), static_cast<std::streamsize>(text.size())).flush();
  if (!out) {
    writes_ = false;
    debug(file_ + " cannot be written: what is measured is not kept");
  }
}

// Of a trial that came to nothing. A later call may have the memory, or finite results; but not every call tries.
Way Choices::unmeasured(const std::string& kind) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (++attempts_[kind] == kAttempts) known_[kind] = Choice();
  return Way::kStepwise;
}

Way Choices::choose(const std::string& given, const Trial* trial) {
  const std::string kind = field(given);
  const auto found = [&]() -> std::optional<Way> {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = known_.find(kind);
    return at == known_.end() ? std::nullopt : std::optional<Way>(at->second.way);
  };
  if (const auto way = found(); way || !trial) return way.value_or(Way::kStepwise);
  const std::lock_guard<std::mutex> alone(trials_);
  if (const auto way = found()) return *way;  // meanwhile
  Choice choice;
  if (!trial->begin()) return unmeasured(kind);
  if (!trial->run(Way::kStepwise).empty()) return Way::kStepwise;  // the call will fail, and say so
  choice.failure = trial->run(Way::kPersistent);
  if (choice.failure.empty()) {
    const std::optional<double> deviation = trial->deviation();
    if (!deviation) return unmeasured(kind);  // nothing to hold results against
    if (!(*deviation <= 1)) {
      choice.failure = "results deviate by " + std::to_string(*deviation) + " times what is allowed";
    }
  }
  if (choice.failure.empty()) {
    for (int i = 0; i < kTrials; ++i) {
      for (const Way way : {Way::kStepwise, Way::kPersistent}) {
        double& least = choice.seconds[static_cast<int>(way)];
        const double seconds = trial->seconds(way);
        least = i == 0 ? seconds : std::min(least, seconds);
      }
    }
    const bool sooner = choice.seconds[1] < choice.seconds[0];
    choice.way = sooner ? Way::kPersistent : Way::kStepwise;
  }
  keep(kind, choice);
  return choice.way;
}

std::map<std::string, Choice> Choices::known() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return known_;
}

std::vector<std::string> Choices::take_remarks() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(remarks_, {});
}

std::string kind_of(const char* cell, DType dtype, bool tf32, const LayerSizes& z, const char* what) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  const auto rounded_up = [](int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
  };
  std::ostringstream kind;
  kind << cell << ' ' << names[static_cast<int>(dtype)] << (dtype == DType::kFloat32 && tf32 ? " tf32 " : " ") << what
       << " T" << rounded_up(z.T) << " B" << rounded_up(z.B) << " H" << z.H << " D" << z.D
       << (z.N < z.T * z.B ? " ragged" : "");
  return kind.str();
}

std::string this_library() {
  Dl_info found = {};
  std::error_code error;
  if (!dladdr(reinterpret_cast<const void*>(&this_library), &found) || !found.dli_fname) return "unknown library";
  const auto written = fs::last_write_time(found.dli_fname, error).time_since_epoch().count();
  return "library of " + std::to_string(error ? 0 : written);
}

std::string choices_file() {
  const auto named = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  const std::string cache = named("XDG_CACHE_HOME"), home = named("HOME");
  if (!cache.empty() && fs::path(cache).is_absolute()) return (fs::path(cache) / "fusedrnn/choices.txt").string();
  return home.empty() ? "" : (fs::path(home) / ".cache/fusedrnn/choices.txt").string();
}

}  // namespace fusedrnn
