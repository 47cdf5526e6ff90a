// From torch's boxed calls to functions, whose arguments are those of the schema in its order:
//
//   Tensor run(const Tensor& x, double scale);  // (Tensor x, float scale) -> Tensor
//   m.impl("run", BK_BOX(run));
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
#include "common/library.h"

#include <concepts>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace bigkernel {

// The types that torch hands arguments over in. It puts each into 64 bits and takes out whatever
// type is asked for: a float of the schema is a double, and read as a float it would be wrong and
// no error.
template <class T>
constexpr bool kOfSchema =
    std::same_as<T, torch::stable::Tensor> || std::same_as<T, bool> || std::same_as<T, int64_t> ||
    std::same_as<T, double> || std::same_as<T, std::string>;
template <class T>
constexpr bool kOfSchema<std::optional<T>> = kOfSchema<T>;
template <class T>
constexpr bool kOfSchema<std::vector<T>> = kOfSchema<T>;
#define BK_ASSERT_OF_SCHEMA(...)                                                             \
  static_assert(__VA_ARGS__,                                                                 \
                "what a schema calls Tensor, bool, int, float and str is a Tensor, bool, "   \
                "int64_t, double and std::string here; Tensor? is a std::optional<Tensor>, " \
                "Tensor[] a std::vector<Tensor>")

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
    BK_ASSERT_OF_SCHEMA(kOfSchema<T>);
    return torch::stable::detail::to<T>(*next++);
  }
}

// How many results a return type is.
template <class R>
constexpr uint64_t kResults = std::is_void_v<R> ? 0 : 1;
template <class... T>
constexpr uint64_t kResults<std::tuple<T...>> = sizeof...(T);

template <class T>
void put_results(StableIValue* stack, T result) {
  BK_ASSERT_OF_SCHEMA(kOfSchema<T>);
  stack[0] = torch::stable::detail::from(std::move(result));
}
template <class... T>
void put_results(StableIValue* stack, std::tuple<T...> results) {
  BK_ASSERT_OF_SCHEMA((kOfSchema<T> && ...));
  torch::stable::detail::box_from_tuple(stack, std::move(results));
}

template <auto kFunction>
struct Boxed;

template <class R, class... P, R (*kFunction)(P...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr uint64_t expected = (argument_count<std::remove_cvref_t<P>>() + ... + 0);
    STD_TORCH_CHECK(arguments == expected, "the schema has ", arguments,
                    " arguments, but the function takes ", expected);
    STD_TORCH_CHECK(results == kResults<R>, "the schema has ", results,
                    " results, but the function returns ", kResults<R>);
    [[maybe_unused]] StableIValue* next = stack;  // of a function without arguments
    std::tuple<std::remove_cvref_t<P>...> values{take_argument<std::remove_cvref_t<P>>(next)...};
    if constexpr (std::is_void_v<R>)
      std::apply(kFunction, std::move(values));
    else
      put_results(stack, std::apply(kFunction, std::move(values)));
  }
};

}  // namespace bigkernel

#define BK_BOX(...) ::bigkernel::Boxed<(__VA_ARGS__)>::call
