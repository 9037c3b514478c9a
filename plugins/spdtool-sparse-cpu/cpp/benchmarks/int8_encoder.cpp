// Whole encoders with zeros in blocks of 1x4: products of 8-bit numbers against float32 products of the same weights, in
// interleaved rounds on one thread. The third column is VNNI's layout without the instruction, where it is compiled.
//
//   cmake -S plugins/spdtool-sparse-cpu -B build/products -DSPARSE_CPU_BENCHMARKS=ON -DSPARSE_CPU_TESTS=ON
//   cmake --build build/products && build/products/cpp/benchmarks/int8_encoder [ROUNDS]
#include <cstdlib>

#include "encoder.hpp"
#include "../tests/plain.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

struct Shape {
  uint32_t hidden, inner;
  size_t layers, heads;
};

// Parameters in the order of the operator, with the matrices in blocks or as single weights.
std::vector<Bytes> random_parameters(const Shape& shape, double density, bool blocks) {
  Chance chance(1);
  std::vector<Bytes> all;
  const auto numbers = [&](size_t size, float middle) {
    all.push_back(pack(vector_matrix(random_vector(chance, size, middle, 0.3f)), 0));
  };
  const auto norm = [&] { numbers(shape.hidden, 1.0f), numbers(shape.hidden, 0.0f); };
  const auto table = [&](uint32_t rows) {
    all.push_back(pack(random_matrix(chance, rows, shape.hidden, Values::kInt8, 0.9), 0));
  };
  const auto linear = [&](uint32_t rows, uint32_t columns) {
    const Matrix m = random_blocks(chance, rows, columns, density, 1.5f / std::sqrt(float(columns * density)));
    all.push_back(pack(m, 4, blocks ? 4 : 1));
    numbers(rows, 0.0f);
  };
  table(500), table(512);
  norm();
  for (size_t l = 0; l < shape.layers; l++) {
    for (int n = 0; n < 4; n++) linear(shape.hidden, shape.hidden);
    norm();
    linear(shape.inner, shape.hidden);
    linear(shape.hidden, shape.inner);
    norm();
  }
  return all;
}

struct Engine {
  std::string name;
  std::unique_ptr<Encoder> encoder;
  std::vector<double> seconds;

  Engine(const Shape& shape, const std::vector<Bytes>& parameters, const char* what)
      : name(std::string(what) + " " + (what[0] == 'f' ? best_kernels().name : best_int8_kernels().name)) {
    EncoderShape options;
    options.heads = shape.heads, options.layers = shape.layers, options.reads = Reads::kFirst;
    size_t index = 0;
    encoder = std::make_unique<Encoder>(options, best_machine(), [&](const std::string& parameter) {
      const Bytes& bytes = parameters.at(index++);
      return open(bytes.data(), bytes.size(), parameter);
    });
  }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void time_shape(const Shape& shape, double zeros, int rounds) {
  const std::vector<Bytes> single = random_parameters(shape, 1 - zeros, false);
  const std::vector<Bytes> blocks = random_parameters(shape, 1 - zeros, true);
  std::vector<Engine> engines;
  engines.emplace_back(shape, single, "float32");
  engines.emplace_back(shape, blocks, "int8");
  setenv("SPDTOOL_SPARSE_CPU_ISA", "emulated", 1);
  if (std::string(best_int8_kernels().name) == "emulated") engines.emplace_back(shape, blocks, "int8");
  unsetenv("SPDTOOL_SPARSE_CPU_ISA");
  for (const auto& [batch, length] : {std::pair<size_t, size_t>{1, 32}, {1, 128}, {8, 128}}) {
    Chance chance(3);
    std::vector<int64_t> ids(batch * length), mask(ids.size(), 1);
    for (int64_t& id : ids) id = int64_t(chance.below(500));
    std::vector<float> out(batch * shape.hidden);
    Threads one;
    for (Engine& engine : engines) engine.seconds.clear();
    for (int round = -1; round < rounds; round++)  // the first one is not counted
      for (Engine& engine : engines) {
        const double start = now();
        engine.encoder->run({ids.data(), mask.data(), nullptr, batch, length}, out.data(), one);
        if (round >= 0) engine.seconds.push_back(now() - start);
      }
    std::printf("%zu x %u, %.0f %% zeros, %zu x %zu:", shape.layers, shape.hidden, 100 * zeros, batch, length);
    for (const Engine& engine : engines)
      std::printf("  %s %.2f ms (%.2fx)", engine.name.c_str(), 1e3 * median(engine.seconds),
                  median(engines[0].seconds) / median(engine.seconds));
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 15;
  for (const Shape& shape : {Shape{384, 1536, 6, 12}, Shape{768, 3072, 12, 12}})
    for (const double zeros : {0.9, 0.8}) time_shape(shape, zeros, rounds);
}
