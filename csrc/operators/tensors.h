// What the operators share: devices, dtypes, layouts and pointers of tensors, through torch's stable ABI alone, so that
// one build runs on torch 2.11 and later.
//
// An operator is a schema and, beside it, a function for any executor: check, allocate, Exec::run_*.  Exec is the CPU's
// (ops_cpu.cpp) or CUDA's (ops_cuda.cu).  The Python wrappers in pacd_fast have the documentation and the error
// messages; the checks here are the last line of defence.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "math/half.h"

namespace pacd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A kernel would read the other device's pointers.
template <class... Rest>
void on_one_device(const char* name, const Tensor& first, const Rest&... rest) {
  STD_TORCH_CHECK(((rest.get_device() == first.get_device()) && ...), name, ": all tensors must be on one device");
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Null without a tensor.
template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_channels_last(const Tensor& on, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, on.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// Calls run(Type{}) with the kernel's type for a floating dtype.
template <class Run>
void with_float_type(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::BFloat16) return run(Bfloat16{});
  STD_TORCH_CHECK(dtype == ScalarType::Half, "expected float32, bfloat16 or float16");
  run(Half{});
}

// Calls run(Type{}) for float32 and float64.
template <class Run>
void with_real_type(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, "expected float32 or float64");
  run(double{});
}

// Calls run(infinity), the bits of infinity as a signed integer of a floating dtype's width.
template <class Run>
void with_bits(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Float) return run(int32_t{0x7F800000});
  if (dtype == ScalarType::Double) return run(int64_t{0x7FF0000000000000});
  if (dtype == ScalarType::BFloat16) return run(int16_t{0x7F80});
  STD_TORCH_CHECK(dtype == ScalarType::Half, "expected a floating dtype");
  run(int16_t{0x7C00});
}

}  // namespace pacd
