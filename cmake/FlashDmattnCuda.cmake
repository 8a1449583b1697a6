# The CUDA kernels: whether they are built, what for, and how.
#
# FLASH_DMATTN_HAS_CUDA            ON if they are
# FLASH_DMATTN_CUDA_SOURCES        their sources
# FLASH_DMATTN_SM90_SOURCES        those among them that take instructions of compute capability 9.0a
# flash_dmattn_add_cuda(objects)   adds them to an object library
set(minimum_cuda 12.4)
set(FLASH_DMATTN_HAS_CUDA OFF)
file(GLOB_RECURSE FLASH_DMATTN_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu)
set(FLASH_DMATTN_SM90_SOURCES ${FLASH_DMATTN_CUDA_SOURCES})
list(FILTER FLASH_DMATTN_SM90_SOURCES INCLUDE REGEX /src/cuda/sm90/)

if(NOT FLASH_DMATTN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLASH_DMATTN_CUDA: got ${FLASH_DMATTN_CUDA}, expected AUTO, ON or OFF")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # the flags are below
if(FLASH_DMATTN_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
endif()
if(FLASH_DMATTN_CUDA STREQUAL "ON" OR CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL minimum_cuda)
    set(FLASH_DMATTN_HAS_CUDA ON)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake < 3.26 does not know the compiler's
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    find_package(CUDAToolkit REQUIRED)
  elseif(FLASH_DMATTN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "The CUDA kernels need CUDA >= ${minimum_cuda}, got ${CMAKE_CUDA_COMPILER_VERSION} "
      "(${CMAKE_CUDA_COMPILER}); -DFLASH_DMATTN_CUDA=OFF builds without them.")
  else()
    message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is older than ${minimum_cuda}")
  endif()
endif()

if(NOT FLASH_DMATTN_HAS_CUDA)
  message(STATUS "CUDA kernels: none (FLASH_DMATTN_CUDA=${FLASH_DMATTN_CUDA})")
  return()
endif()

# Code for each compute capability; PTX, which every newer GPU compiles for itself where there is no code for it,
# of the oldest that has a portable one.
set(code_options "")
set(code_names "")
set(ptx "")
foreach(architecture IN LISTS FLASH_DMATTN_CUDA_ARCHITECTURES)
  if(NOT architecture MATCHES "^([0-9]+)[af]?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "FLASH_DMATTN_CUDA_ARCHITECTURES: got ${architecture}, expected 80 or higher")
  endif()
  list(APPEND code_options -gencode=arch=compute_${architecture},code=sm_${architecture})
  list(APPEND code_names sm_${architecture})
  if(architecture MATCHES "^[0-9]+$" AND (ptx STREQUAL "" OR architecture LESS ptx))
    set(ptx ${architecture})
  endif()
endforeach()
if(ptx)
  list(APPEND code_options -gencode=arch=compute_${ptx},code=compute_${ptx})
  list(APPEND code_names PTX)
endif()
list(JOIN code_names ", " code_names)
message(STATUS "CUDA kernels: ${code_names}, by CUDA ${CMAKE_CUDA_COMPILER_VERSION}")

# The Hopper kernels have code for that one alone, and are left out of a build without it.
set(portable_sources ${FLASH_DMATTN_CUDA_SOURCES})
list(REMOVE_ITEM portable_sources ${FLASH_DMATTN_SM90_SOURCES})
set(built_sources ${portable_sources})
set_property(SOURCE ${portable_sources} APPEND PROPERTY COMPILE_OPTIONS ${code_options})
set(has_sm90 0)
if("90a" IN_LIST FLASH_DMATTN_CUDA_ARCHITECTURES)
  set(has_sm90 1)
  list(APPEND built_sources ${FLASH_DMATTN_SM90_SOURCES})
  set_property(SOURCE ${FLASH_DMATTN_SM90_SOURCES} APPEND PROPERTY
    COMPILE_OPTIONS -gencode=arch=compute_90a,code=sm_90a)
endif()

# -fno-gnu-unique: no symbol of the library may merge with one of another library of the process.
set(cuda_options -lineinfo -Xcompiler=-Wall,-Wextra,-fno-gnu-unique)
if(FLASH_DMATTN_WERROR)
  list(APPEND cuda_options -Werror=all-warnings)
endif()

set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/cuda/architectures.cpp APPEND PROPERTY
  COMPILE_DEFINITIONS FLASH_DMATTN_CUDA_ARCHITECTURES="${code_names}")

# The static runtime: the library loads where there is no driver.
function(flash_dmattn_add_cuda objects)
  target_sources(${objects} PRIVATE
    ${built_sources} ${PROJECT_SOURCE_DIR}/src/cuda/architectures.cpp)
  target_compile_options(${objects} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
  target_compile_definitions(${objects} PUBLIC FLASH_DMATTN_CUDA=1 FLASH_DMATTN_SM90=${has_sm90})
  target_link_libraries(${objects} PUBLIC CUDA::cudart_static)
  set_target_properties(${objects} PROPERTIES CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY None)
endfunction()
