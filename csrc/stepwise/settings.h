// What the user has set in torch and a GPU's kernels follow. The library cannot ask torch: whoever loaded it says whom
// to ask, and each call asks when it runs.
#pragma once

namespace fusedrnn {

// Without anyone to ask: torch's defaults.
struct Settings {
  bool tf32 = true;         // float32 products may round to TF32, as those of torch.nn's recurrent layers may
  bool may_measure = true;  // the sooner way may be taken (choice.h): not where torch is to be deterministic, for a way
                            // by time has bits by time
};

// Writes a bit for each, in their order; what fails in Python writes nothing, and all are off. May wait for Python's
// lock: hold no other one.
using AskSettings = void (*)(int* settings);
void ask_settings(AskSettings);  // null: nobody
Settings settings();             // now

}  // namespace fusedrnn
