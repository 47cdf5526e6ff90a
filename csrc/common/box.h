// From torch's boxed calls to functions that take structs in place of rows of arguments.
//
// A struct that stands for several arguments of a schema says which, in the schema's order:
//
//   struct Options {
//     double scale;
//     bool causal;
//     auto fields() { return std::tie(scale, causal); }
//   };
//   Tensor run(const Tensor& x, const Options& options);  // (Tensor x, float scale, bool causal)
//   m.impl("run", BK_BOX(run));
//
// Binding code only.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>

namespace bigkernel {

template <class T>
concept HasFields = requires(T& t) { t.fields(); };

template <class T>
constexpr uint64_t argument_count() {
  if constexpr (HasFields<T>)
    return std::tuple_size_v<decltype(std::declval<T&>().fields())>;
  else
    return 1;
}

// The next argument, or the next few.
template <class T>
T take_argument(StableIValue*& next) {
  if constexpr (HasFields<T>) {
    T value{};
    std::apply(
        [&](auto&... field) {
          ((field = take_argument<std::remove_reference_t<decltype(field)>>(next)), ...);
        },
        value.fields());
    return value;
  } else {
    return torch::stable::detail::to<T>(*next++);
  }
}

template <class T>
void put_results(StableIValue* stack, T result) {
  stack[0] = torch::stable::detail::from(std::move(result));
}
template <class... T>
void put_results(StableIValue* stack, std::tuple<T...> results) {
  torch::stable::detail::box_from_tuple(stack, std::move(results));
}

template <auto kFunction>
struct Boxed;

template <class R, class... P, R (*kFunction)(P...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    constexpr uint64_t expected = (argument_count<std::remove_cvref_t<P>>() + ... + 0);
    STD_TORCH_CHECK(arguments == expected, "the schema has ", arguments,
                    " arguments, but the function takes ", expected);
    StableIValue* next = stack;
    std::tuple<std::remove_cvref_t<P>...> values{take_argument<std::remove_cvref_t<P>>(next)...};
    if constexpr (std::is_void_v<R>)
      std::apply(kFunction, std::move(values));
    else
      put_results(stack, std::apply(kFunction, std::move(values)));
  }
};

}  // namespace bigkernel

#define BK_BOX(...) ::bigkernel::Boxed<(__VA_ARGS__)>::call
