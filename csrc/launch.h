// How a kernel gets onto a CUDA card: the one place where a grid is launched and its errors are read.
//
// ops_cuda.cu needs nothing else of the CUDA runtime.  A file that brings its own `launch`, `multiprocessors` and the
// words of CUDA C++ (__global__, threadIdx, ...) can include ops_cuda.cu under another compiler, and play the kernels
// there: python_tests/played.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <typeinfo>

// In torch 2.11 this lives in a library that a CPU-only torch does not have: looked up when first used.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace pacd {

// Of the card that grids are cut for; a larger or a smaller one takes the same grids.
constexpr int64_t multiprocessors = 132;

template <class Kernel>
std::string kernel_name() {
  char* name = abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, nullptr);
  const std::string text = name ? name : typeid(Kernel).name();
  std::free(name);
  return text;
}

// PACD_CUDA_SYNC=1 waits for every kernel, so that an error of its threads is reported with its name and where it was
// called, not at some later call; read once.
inline bool waits_for_kernels() {
  static const bool waits = [] {
    const char* value = std::getenv("PACD_CUDA_SYNC");
    return value && std::strcmp(value, "1") == 0;
  }();
  return waits;
}

// Runs a __global__ function of (kernel, ...) on the current stream of the tensor's device.
template <class Kernel, class... Rest>
void launch(void (*play)(Kernel, Rest...), int64_t blocks, int threads, const torch::stable::Tensor& on,
            const Kernel& kernel, std::type_identity_t<Rest>... rest) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "pacd_fast: this torch has no CUDA");
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const auto check = [](cudaError_t status, const char* what) {
    STD_TORCH_CHECK(status == cudaSuccess, "pacd_fast: ", what, " of ", kernel_name<Kernel>(), ": ",
                    cudaGetErrorString(status));
  };
  play<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(kernel, rest...);
  check(cudaGetLastError(), "launch");
  if (waits_for_kernels()) check(cudaStreamSynchronize(stream), "run");
}

}  // namespace pacd
