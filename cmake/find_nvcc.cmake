# Sets PACD_NVCC where the CUDA operators can be built, and CMAKE_CUDA_ARCHITECTURES to what that nvcc knows; says in one
# line what was decided.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "CUDA operators: left out, no nvcc was found")
  return()
endif()

# Asked before the language is enabled, which already compiles for all architectures.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE NVCC_VERSION ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" NVCC_VERSION "${NVCC_VERSION}")
set(NVCC_MAJOR "${CMAKE_MATCH_1}")
set(NVCC_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
if(NVCC_VERSION VERSION_LESS 12.0)
  message(WARNING "CUDA operators: left out, ${CMAKE_CUDA_COMPILER} is not nvcc 12.0 or later; put one on PATH for them")
  return()
endif()
if("${CMAKE_CUDA_FLAGS} $ENV{CUDAFLAGS} $ENV{NVCC_PREPEND_FLAGS} $ENV{NVCC_APPEND_FLAGS}" MATCHES
    "fast_math|fmad=true|ftz=true|prec-div=false|prec-sqrt=false")
  message(FATAL_ERROR "pacd_fast's bounds need IEEE arithmetic on CUDA too: take ${CMAKE_MATCH_0} out of CUDAFLAGS, "
    "NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS")
endif()

# Machine code for each generation (it runs on later cards of the same one), and PTX of the last for what comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real)
  if(NVCC_VERSION VERSION_LESS 13.0)
    list(PREPEND CMAKE_CUDA_ARCHITECTURES 70-real)
  endif()
  if(NVCC_VERSION VERSION_LESS 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90)
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90-real 100-real 120)
  endif()
endif()
set(PACD_NVCC ON)

# The runtime is linked statically, and runs on drivers of nvcc's major version or later.
string(REGEX MATCH "^[0-9]+" TORCH_CUDA_MAJOR "${TORCH_CUDA}")
if(NOT TORCH_CUDA)
  message(STATUS "CUDA operators: compiled by nvcc ${NVCC_VERSION} as a check and left out, torch ${TORCH_VERSION} has no CUDA")
elseif(NVCC_MAJOR GREATER TORCH_CUDA_MAJOR)
  set(DRIVERS_12 525)
  set(DRIVERS_13 580)
  message(WARNING "CUDA operators: nvcc ${NVCC_VERSION} beside a torch for CUDA ${TORCH_CUDA}: they need a driver >= "
    "${DRIVERS_${NVCC_MAJOR}}, torch itself one >= ${DRIVERS_${TORCH_CUDA_MAJOR}}; for a driver between the two put nvcc "
    "${TORCH_CUDA_MAJOR}.x first on PATH")
else()
  message(STATUS "CUDA operators: nvcc ${NVCC_VERSION}, torch for CUDA ${TORCH_CUDA}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
endif()
