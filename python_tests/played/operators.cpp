// The operators of csrc/ops_cuda.cu played on the CPU, as torch.ops.pacd_played; PACD_PLAYED: that file, or a copy.
#include "cuda.h"

#include PACD_PLAYED

STABLE_TORCH_LIBRARY(pacd_played, library) { pacd::define(library, pacd::operators<pacd::Cuda>); }

STABLE_TORCH_LIBRARY_IMPL(pacd_played, CPU, library) { pacd::implement(library, pacd::operators<pacd::Cuda>); }
