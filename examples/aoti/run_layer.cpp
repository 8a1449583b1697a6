// Runs a layer that export_layer.py packaged, in a process without Python, and compares it with what Python
// computed. The package names the operators select and forward; it finds them registered because
// libflash_dmattn_torch.so is loaded first.
//
//   run_layer libflash_dmattn_torch.so layer.pt2 cases.pt

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

c10::IValue load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return torch::jit::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

// Inductor fuses and orders the operations around the attention in its own way.
double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 1e-5 : 2e-2; }

int run(const char* library, const char* package, const char* cases) {
  if (dlopen(library, RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader layer(package);
  const at::Device device(layer.get_metadata().at("AOTI_DEVICE_KEY"));

  const c10::IValue pairs = load(cases);
  int wrong = 0;
  for (const c10::IValue& pair : pairs.toListRef()) {
    std::vector<at::Tensor> inputs;  // the arguments of the layer, nested ones in their order
    for (const c10::IValue& input : pair.toTupleRef().elements()[0].toListRef()) {
      inputs.push_back(input.toTensor().to(device));
    }
    const at::Tensor expected = pair.toTupleRef().elements()[1].toTensor();
    const at::Tensor out = layer.run(inputs).at(0).cpu();
    const double largest = expected.abs().max().item<double>();
    const double difference = (out - expected).abs().max().item<double>();
    wrong += !(difference <= tolerance(out.scalar_type()) * largest);

    std::ostringstream shape;
    shape << out.sizes();
    std::printf("%s on %s: largest difference %.1e of %.1e\n", shape.str().c_str(), device.str().c_str(),
                difference, largest);
  }
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s libflash_dmattn_torch.so layer.pt2 cases.pt\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
