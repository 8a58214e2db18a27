// ThreadSanitizer does not see how OpenMP's threads start, meet and end (`make sanitize`): these tell it. Each file
// that includes this inside a namespace of its own has an order of its own.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
char openmp_order;
inline void after_others() { __tsan_acquire(&openmp_order); }
inline void before_others() { __tsan_release(&openmp_order); }
#else
inline void after_others() {}
inline void before_others() {}
#endif
