// GCC's headers ask glibc 2.32 whether the process has one thread, to count references without
// atomic instructions. The library is for glibc 2.28, which cannot be asked: there are always
// others.
extern "C" {
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;
}
