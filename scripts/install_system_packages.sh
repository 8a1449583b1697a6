#!/usr/bin/env bash
# Makes sure that the machine has what the build needs: a C++20 compiler, CMake, Python >= 3.10 with venv, Highway,
# GoogleTest and Google Benchmark. As root on Debian and Ubuntu it installs what is missing; otherwise it says what to
# install. Usage: install_system_packages.sh [PYTHON]; without PYTHON no virtual environment is needed.
set -euo pipefail

python=${1:-}
has_header() { echo "#include <$1>" | c++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; }
compiles_cxx20() { has_header concepts; }

missing() {
  command -v make >/dev/null || echo make
  command -v cmake >/dev/null || echo cmake
  command -v c++ >/dev/null || echo g++
  if [[ -n $python ]]; then
    command -v "$python" >/dev/null || echo python3
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  fi
  # A header can be looked for only with a compiler.
  has_header hwy/highway.h || echo libhwy-dev
  has_header gtest/gtest.h || echo libgtest-dev
  has_header benchmark/benchmark.h || echo libbenchmark-dev
}

mapfile -t packages < <(missing)
if ((${#packages[@]} > 0)); then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Please install ${packages[*]} (Debian, Ubuntu: sudo apt-get install ${packages[*]}), then try again." >&2
    exit 1
  fi
  echo "Installing ${packages[*]}"
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
fi

if ! compiles_cxx20; then
  echo "The compiler c++ ($(c++ --version | head -1)) does not know C++20: please install GCC >= 11 or Clang >= 14." >&2
  exit 1
fi
if [[ -n $python ]] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "$python is $("$python" --version), and flash_dmattn needs Python >= 3.10: make PYTHON=<another>." >&2
  exit 1
fi
