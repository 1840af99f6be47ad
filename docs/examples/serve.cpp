// A program without Python that serves what `adatape-kernels export --format aoti` wrote.
//
//   adatape_serve MODEL.aoti.pt2 INPUTS
//
// INPUTS is a file of float32 numbers, one input after another, each as the model's preprocessing
// makes it. For each input the program prints its logits and then the number of its tape tokens.
// It is linked against libadatape_cpu, which brings our kernels. docs/exporting.md shows how both
// are built.

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using Metadata = std::unordered_map<std::string, std::string>;

const std::string& entry(const Metadata& metadata, const std::string& name) {
  const auto found = metadata.find("adatape_kernels." + name);
  if (found == metadata.end()) throw std::runtime_error("the model does not tell its " + name);
  return found->second;
}

// Declares the ops that the model calls, whose schemas it brings, a line each. The kernels are in
// libadatape_cpu, and the declarations must be there before the model is loaded.
torch::Library declare_ops(const std::string& schemas) {
  torch::Library library(torch::Library::FRAGMENT, "adatape_cpu", std::nullopt, __FILE__, __LINE__);
  std::istringstream lines(schemas);
  for (std::string schema; std::getline(lines, schema);) library.def(schema.c_str());
  return library;
}

at::ScalarType dtype_of(const std::string& name) {
  const std::unordered_map<std::string, at::ScalarType> dtypes{{"float32", at::kFloat},
                                                               {"float64", at::kDouble},
                                                               {"bfloat16", at::kBFloat16},
                                                               {"float16", at::kHalf}};
  return dtypes.at(name);
}

// Returns a tensor (batch, *shape) of as many inputs as the file holds.
at::Tensor read_inputs(const char* name, const std::string& shape_text) {
  std::ifstream file(name, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + name);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};

  std::istringstream numbers(shape_text);
  std::vector<int64_t> shape{std::istream_iterator<int64_t>(numbers), {}};
  int64_t input_bytes = sizeof(float);
  for (const int64_t size : shape) input_bytes *= size;
  const int64_t batch = static_cast<int64_t>(bytes.size()) / input_bytes;
  if (batch == 0 || batch * input_bytes != static_cast<int64_t>(bytes.size())) {
    throw std::runtime_error("expected inputs of " + std::to_string(input_bytes) + " bytes, got " +
                             std::to_string(bytes.size()));
  }
  shape.insert(shape.begin(), batch);
  at::Tensor inputs = at::empty(shape);
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(inputs.data_ptr()));
  return inputs;
}

void serve(const char* model, const char* inputs_name) {
  const Metadata metadata = Loader::load_metadata_from_package(model, "model");
  const torch::Library ops = declare_ops(entry(metadata, "ops"));
  const at::Tensor inputs = read_inputs(inputs_name, entry(metadata, "input_shape"));
  const at::ScalarType dtype = dtype_of(entry(metadata, "input_dtype"));

  Loader loader(model);
  const std::vector<at::Tensor> outputs = loader.run({inputs.to(dtype)});
  const at::Tensor logits = outputs.at(0).to(at::kFloat).contiguous();
  const at::Tensor tape_lens = outputs.at(1).contiguous();
  for (int64_t i = 0; i < logits.size(0); ++i) {
    for (int64_t c = 0; c < logits.size(1); ++c) {
      std::cout << logits.const_data_ptr<float>()[i * logits.size(1) + c] << ' ';
    }
    std::cout << tape_lens.const_data_ptr<int32_t>()[i] << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: adatape_serve MODEL.aoti.pt2 INPUTS\n";
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    std::cout.precision(9);
    serve(argv[1], argv[2]);
  } catch (const std::exception& error) {
    const std::string message = error.what();  // torch's errors go on with a trace of the stack
    std::cerr << "adatape_serve: " << message.substr(0, message.find('\n')) << '\n';
    return 1;
  }
}
