# The PyTorch operators: libflash_dmattn_torch.so, loaded by the Python package.
#
# Only LibTorch's stable ABI is used, so one build serves every PyTorch from TORCH_TARGET_VERSION on and every
# Python. find_package(Torch) would drag in CUDA and torch's own flags; the interpreter knows all that is
# needed.
set(FLASH_DMATTN_TORCH_MINIMUM 2.10)
set(way_out "`pip install 'torch>=${FLASH_DMATTN_TORCH_MINIMUM}'` first, then install with --no-build-isolation")

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import os, torch; print(torch.__version__, os.path.dirname(torch.__file__), sep=';', end='')"
  OUTPUT_VARIABLE torch_info ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  if(torch_error MATCHES "No module named 'torch'")
    set(reason "${Python_EXECUTABLE} has no PyTorch")
  else()
    string(STRIP "${torch_error}" torch_error)
    string(REGEX REPLACE ".*\n" "" torch_error "${torch_error}")
    set(reason "import torch fails with ${torch_error}")
  endif()
  message(FATAL_ERROR "flash_dmattn is built against the installed PyTorch, and ${reason}: ${way_out}.")
endif()
list(GET torch_info 0 torch_version)
list(GET torch_info 1 torch_dir)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${torch_version}")
if(torch_release VERSION_LESS FLASH_DMATTN_TORCH_MINIMUM)
  message(FATAL_ERROR
    "flash_dmattn needs PyTorch >= ${FLASH_DMATTN_TORCH_MINIMUM}, got ${torch_version} (${torch_dir}): ${way_out}.")
endif()
message(STATUS "PyTorch ${torch_version}: ${torch_dir}")

set(FLASH_DMATTN_TORCH_SOURCES ${PROJECT_SOURCE_DIR}/bindings/torch/operators.cpp)

# A shared library of the operators in the given namespace around the given objects. The linker finds torch
# where the interpreter has it; the loader finds it already loaded, so no path to it is recorded.
function(flash_dmattn_add_torch_library name objects namespace)
  add_library(${name} SHARED ${FLASH_DMATTN_TORCH_SOURCES} $<TARGET_OBJECTS:${objects}>)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/include)
  target_include_directories(${name} SYSTEM PRIVATE
    ${torch_dir}/include ${torch_dir}/include/torch/csrc/api/include)
  target_compile_definitions(${name} PRIVATE
    TORCH_TARGET_VERSION=0x020a000000000000 FLASH_DMATTN_TORCH_NAMESPACE=${namespace}
    $<TARGET_PROPERTY:${objects},INTERFACE_COMPILE_DEFINITIONS>)
  target_compile_options(${name} PRIVATE -Wall -Wextra $<$<BOOL:${FLASH_DMATTN_WERROR}>:-Werror>)
  target_link_libraries(${name} PRIVATE $<TARGET_PROPERTY:${objects},INTERFACE_LINK_LIBRARIES>)
  target_link_options(${name} PRIVATE
    -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/no_exports.map -L${torch_dir}/lib
    -Wl,--push-state,--no-as-needed -ltorch -ltorch_cpu -Wl,--pop-state)
  set_target_properties(${name} PROPERTIES
    INSTALL_RPATH "$ORIGIN" LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/no_exports.map)
endfunction()

flash_dmattn_add_torch_library(flash_dmattn_torch flash_dmattn_objects flash_dmattn)

# Component "python", relative to the directory that holds the package: site-packages for a wheel. For work in
# the source tree without pip: cmake --install build --component python --prefix python.
install(TARGETS flash_dmattn_torch LIBRARY DESTINATION flash_dmattn/lib COMPONENT python EXCLUDE_FROM_ALL)
flash_dmattn_highway_runtime(highway_file highway_soname)
if(highway_file)
  install(FILES ${highway_file} RENAME ${highway_soname} DESTINATION flash_dmattn/lib
    COMPONENT python EXCLUDE_FROM_ALL)
endif()
