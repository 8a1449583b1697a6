# Installs the C++ library into an empty prefix, builds the examples in C++ and C against it through find_package, and
# runs them. Variables: BUILD_DIR of the library, EXAMPLES, WORK_DIR, GENERATOR, CXX_COMPILER, C_COMPILER, FLAGS.
file(REMOVE_RECURSE ${WORK_DIR})
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  message("${output}")
  if(NOT result EQUAL 0)
    string(JOIN " " command ${ARGN})
    message(FATAL_ERROR "${command}: ${result}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

function(check_example folder program expected_output)
  run(${CMAKE_COMMAND} -S ${EXAMPLES}/${folder} -B ${WORK_DIR}/${folder} -G ${GENERATOR}
    -DCMAKE_CXX_COMPILER=${CXX_COMPILER} -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_CXX_FLAGS=${FLAGS}
    -DCMAKE_C_FLAGS=${FLAGS} -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
  run(${CMAKE_COMMAND} --build ${WORK_DIR}/${folder})
  run(${WORK_DIR}/${folder}/${program})
  if(NOT output MATCHES "${expected_output}")
    message(FATAL_ERROR "the example printed something else")
  endif()
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/prefix)
check_example(cpp minimal "the last query sees 64 of 1024 keys")
check_example(c attention "0 of 40 lifetimes differ")
