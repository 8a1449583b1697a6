#include "kernel_name.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace emulator {
namespace {

struct Module {
  std::uintptr_t address;  // looked for
  std::uintptr_t base = 0;
  std::string path{};
};

Module module_of(std::uintptr_t address) {
  Module module{address};
  const auto find = [](dl_phdr_info* info, std::size_t, void* context) {
    auto* module = static_cast<Module*>(context);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
      if (info->dlpi_phdr[i].p_type != PT_LOAD || module->address < begin) continue;
      if (module->address >= begin + info->dlpi_phdr[i].p_memsz) continue;
      module->base = info->dlpi_addr;
      module->path = *info->dlpi_name != '\0' ? info->dlpi_name : "/proc/self/exe";
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(find, &module);
  return module;
}

// Kernels are hidden or local: the loader does not know their names, the symbol table of the file does.
std::string symbol_at(const Module& module) {
  std::ifstream file(module.path, std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  const auto read = [&](std::size_t offset, auto& to) {
    if (offset + sizeof(to) > image.size()) return false;
    std::memcpy(&to, image.data() + offset, sizeof(to));
    return true;
  };
  ElfW(Ehdr) header;
  if (!read(0, header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    ElfW(Shdr) section;
    ElfW(Shdr) names;
    if (!read(header.e_shoff + i * sizeof(section), section) || section.sh_type != SHT_SYMTAB) continue;
    if (!read(header.e_shoff + section.sh_link * sizeof(names), names)) continue;
    ElfW(Sym) symbol;
    for (std::size_t at = 0; at + sizeof(symbol) <= section.sh_size; at += sizeof(symbol)) {
      if (!read(section.sh_offset + at, symbol) || (symbol.st_info & 0xf) != STT_FUNC) continue;
      if (module.base + symbol.st_value == module.address)
        return image.data() + names.sh_offset + symbol.st_name;
    }
  }
  return "";
}

}  // namespace

std::string kernel_name(const void* function) {
  const std::string symbol = symbol_at(module_of(reinterpret_cast<std::uintptr_t>(function)));
  if (symbol.empty()) {
    char address[32];
    std::snprintf(address, sizeof(address), "at %p", function);
    return address;
  }
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : symbol;
  std::free(readable);
  return name;
}

}  // namespace emulator
