# Installs the C++ library and the CMake package through which find_package(flash_dmattn) finds it.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_dmattn)
install(TARGETS flash_dmattn EXPORT flash_dmattn-targets COMPONENT cpp)
install(DIRECTORY include/flash_dmattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT flash_dmattn-targets NAMESPACE flash_dmattn:: DESTINATION ${package_dir} COMPONENT cpp)
configure_package_config_file(cmake/flash_dmattn-config.cmake.in flash_dmattn-config.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(flash_dmattn-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/flash_dmattn-config.cmake
  ${PROJECT_BINARY_DIR}/flash_dmattn-config-version.cmake
  cmake/FlashDmattnHighway.cmake
  DESTINATION ${package_dir} COMPONENT cpp)
