// The one function that the library exports: it registers everything under a package's name.
#include "common/library.h"

#include <exception>
#include <list>
#include <map>
#include <string>

namespace bigkernel {

std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

}  // namespace bigkernel

// Registers the kernels for the ops torch.ops.<package>, and the ops of torch.ops.<package>_native;
// a second time does nothing but answer as the first did. Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* bigkernel_register(
    const char* package) {
  static std::map<std::string, std::string> errors;
  static std::list<bigkernel::Registration::Library> kept;
  const auto [found, is_new] = errors.try_emplace(package);
  std::string& error = found->second;
  if (is_new) {
    try {
      for (const auto& one : bigkernel::registrations()) {
        const std::string name = std::string(package) + one.suffix;
        one.fill(kept.emplace_back(one.kind, name.c_str(), one.key, one.file, one.line));
      }
    } catch (const std::exception& thrown) {
      error = thrown.what();
    }
  }
  return error.empty() ? nullptr : error.c_str();
}
