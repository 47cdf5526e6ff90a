// What registers the kernels as ops, in the namespaces of the package that loads the library.
//
//   BK_KERNELS(CPU, m) { .. }  // for the ops of torch.ops.<package>, which Python defines
//   BK_OWN_OPS(m) { .. }       // schemas of torch.ops.<package>_native
//   BK_OWN_KERNELS(m) { .. }   // for these
//
// The package tells its name after loading (`bigkernel_register`), and has not always the same one:
// as a kernel of Hugging Face's hub it has another in every build (tools/hub.py), since torch lets
// a namespace be defined once in a process. Binding code only.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace bigkernel {

struct Registration {
  using Library = torch::stable::detail::StableLibrary;

  Library::Kind kind;
  const char* suffix;  // of the package's name
  const char* key;     // dispatch key, of kernels
  const char* file;
  uint32_t line;
  void (*fill)(Library&);
};

// All of the library: filled while it is loaded, in no order.
std::vector<Registration>& registrations();

struct Register {
  explicit Register(const Registration& one) { registrations().push_back(one); }
};

}  // namespace bigkernel

#define BK_KERNELS(key, m) BK_REGISTER(IMPL, "", #key, m, __COUNTER__)
#define BK_OWN_OPS(m) BK_REGISTER(FRAGMENT, "_native", nullptr, m, __COUNTER__)
#define BK_OWN_KERNELS(m) BK_REGISTER(IMPL, "_native", "CompositeExplicitAutograd", m, __COUNTER__)

#define BK_REGISTER(kind, suffix, key, m, number) BK_REGISTER_(kind, suffix, key, m, number)
#define BK_REGISTER_(kind, suffix, key, m, number)                                                 \
  static void bk_fill_##number(bigkernel::Registration::Library&);                                 \
  static const bigkernel::Register bk_register_##number(                                           \
      bigkernel::Registration{bigkernel::Registration::Library::Kind::kind, suffix, key, __FILE__, \
                              __LINE__, &bk_fill_##number});                                       \
  void bk_fill_##number(bigkernel::Registration::Library& m)
