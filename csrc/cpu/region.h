// A parallel region that ThreadSanitizer can follow. Included, as order.h, inside a namespace of the file's own.
#include "order.h"

// body(index) on at most `threads` threads. They meet first: only then has the sanitizer seen what the region shares.
template <class Body>
void on_threads(int threads, const Body& body) {
  before_others();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    before_others();
#pragma omp barrier
    after_others();
    body(omp_get_thread_num());
    before_others();
  }
  after_others();
}
