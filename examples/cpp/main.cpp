// Runs a quantized model from an AOTInductor package, a chunk of a sequence after the other, without Python. It reads
// float32s [steps, batch, input_size] from standard input to its end, and writes the model's outputs [steps, batch,
// ...] to standard output, then the last states h and c.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The library registers its operators as it is loaded; whoever opens a package with them must have done that.
void load_operators(const char* library) {
  if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

void write(const at::Tensor& values) {
  const at::Tensor plain = values.contiguous();
  fwrite(plain.const_data_ptr<float>(), sizeof(float), plain.numel(), stdout);
}

void run(const char* package, int64_t batch, int64_t chunk) {
  torch::inductor::AOTIModelPackageLoader model(package);
  auto metadata = model.get_metadata();  // what export_model.py wrote there
  const int64_t input_size = std::stoll(metadata.at("input_size"));
  const std::vector<int64_t> state = {std::stoll(metadata.at("cells")), batch, std::stoll(metadata.at("hidden_size"))};

  const c10::InferenceMode inference;
  at::Tensor h = at::zeros(state), c = at::zeros(state);
  std::vector<float> values(chunk * batch * input_size);
  while (const int64_t read = fread(values.data(), sizeof(float), values.size(), stdin)) {
    const int64_t steps = read / (batch * input_size);
    if (read != steps * batch * input_size) throw std::runtime_error("the input ends within a step");
    const at::Tensor features = at::from_blob(values.data(), {steps, batch, input_size});
    const std::vector<at::Tensor> results = model.run({features, h, c});
    write(results.at(0));
    h = results.at(1);
    c = results.at(2);
  }
  write(h);
  write(c);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s MODEL.pt2 OPERATORS.so BATCH STEPS_A_CALL < floats > floats\n", argv[0]);
    return 2;
  }
  try {
    load_operators(argv[2]);
    run(argv[1], std::stoll(argv[3]), std::stoll(argv[4]));
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
