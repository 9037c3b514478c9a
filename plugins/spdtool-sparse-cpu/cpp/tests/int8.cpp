// Products of 8-bit numbers against sums of integers, one by one.
#include <cstdlib>

#include "encoder.hpp"
#include "linear.hpp"
#include "machine.hpp"
#include "plain.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

const Machine engine = best_machine();

// Tokens rounded as spdtool/models/int8.py defines it; `x` of one token and chunk.
struct Rounded {
  std::vector<int32_t> values;
  float scale;
  int32_t zero;
};

Rounded round_token(const float* x, size_t size) {
  float least = 0, most = 0;
  for (size_t i = 0; i < size; i++) least = std::min(least, x[i]), most = std::max(most, x[i]);
  const float spread = most - least;
  Rounded result{{}, spread > 1e-30f ? spread / 255.0f : 1.0f, 0};
  const float reciprocal = 1.0f / result.scale;
  result.zero = int32_t(std::nearbyint(-least * reciprocal));
  for (size_t i = 0; i < size; i++) {
    const volatile float scaled = x[i] * reciprocal;  // rounded before the sum
    result.values.push_back(std::clamp(int32_t(std::nearbyint(scaled)) + result.zero, 0, 255));
  }
  return result;
}

std::vector<float> product(const Matrix& w, const std::vector<float>& bias, const std::vector<float>& x, size_t n) {
  std::vector<float> y(n * w.rows);
  for (size_t i = 0; i < n; i++) {
    for (size_t r = 0; r < w.rows; r++) y[i * w.rows + r] = bias[r];
    for (size_t depth = 0; depth < w.columns; depth += kInputsOfChunk) {
      const size_t size = std::min<size_t>(kInputsOfChunk, w.columns - depth);
      const Rounded token = round_token(&x[i * w.columns + depth], size);
      for (size_t r = 0; r < w.rows; r++) {
        int32_t sum = 0;
        for (size_t c = 0; c < size; c++)
          sum += (token.values[c] - token.zero) * int32_t(w.raw[r * w.columns + depth + c]);
        y[i * w.rows + r] += float(sum) * w.scales[r] * token.scale;
      }
    }
  }
  return y;
}

LinearWeights int8_weights(const Matrix& m, const std::vector<float>& bias, int gap_bits = 3) {
  const Bytes bytes = pack(m, gap_bits, 4);
  return LinearWeights(open(bytes.data(), bytes.size(), "weight"), bias, engine);
}

// Weights that end where their memory ends, so that the address sanitizer sees each read beyond.
struct Tight {
  explicit Tight(LinearWeights& matrix) : place(std::aligned_alloc(kAlignment, matrix.bytes())) {
    matrix.move_to(static_cast<uint8_t*>(place));
  }
  ~Tight() { std::free(place); }
  void* place;
};

std::vector<float> multiplied(const LinearWeights& matrix, Activation activation, const std::vector<float>& x, size_t n,
                              Lender lender) {
  std::vector<float> y(n * matrix.rows(), -77.0f);
  linear(matrix, activation, x.data(), n, y.data(), engine, lender);
  return y;
}

const std::pair<uint32_t, uint32_t> kShapes[] = {{1, 4},    {7, 8},     {8, 192},  {13, 768}, {9, 772},
                                                 {193, 52}, {200, 400}, {30, 1540}, {385, 36}};

void odd_shapes() {
  Chance chance(1);
  Threads one;
  for (const auto& [rows, columns] : kShapes)
    for (const double density : {0.0, 0.1, 0.5, 1.0}) {
      const Matrix m = random_blocks(chance, rows, columns, density, 1 / std::sqrt(float(columns)));
      const std::vector<float> bias = random_vector(chance, rows);
      LinearWeights matrix = int8_weights(m, bias, density == 1.0 ? 0 : 3);
      CHECK(matrix.rounds());
      const Tight tight(matrix);
      for (const size_t n : {1, 3, 16, 17, 33, 64, 65})
        for (const unsigned cores : {1u, 64u}) {  // tiles are shared, or their rows are
          machine::cores = cores;
          const std::vector<float> x = random_vector(chance, n * columns, n % 2 ? 0.0f : 0.7f);
          check::where = "product " + std::to_string(rows) + " x " + std::to_string(columns) + " of " + std::to_string(n);
          CHECK_CLOSE(multiplied(matrix, Activation::kNone, x, n, one), product(m, bias, x, n), 1e-6);
        }
    }
}

// With scales of 1 and no bias, what comes out is the integer times the token's scale: it has to be that to the last bit.
void integers_are_exact() {
  Chance chance(2);
  Threads one;
  machine::cores = 1;
  for (const auto& [rows, columns] : kShapes) {
    if (columns > kInputsOfChunk) continue;
    Matrix m = random_blocks(chance, rows, columns, 0.5);
    std::fill(m.scales.begin(), m.scales.end(), 1.0f);
    const std::vector<float> bias(rows);
    const LinearWeights matrix = int8_weights(m, bias);
    for (const size_t n : {1, 40}) {
      const std::vector<float> x = random_vector(chance, n * columns);
      check::where = "integers " + std::to_string(rows) + " x " + std::to_string(columns);
      CHECK(multiplied(matrix, Activation::kNone, x, n, one) == product(m, bias, x, n));
    }
  }
}

// The largest sums that there can be.
void extremes() {
  Threads one;
  machine::cores = 1;
  for (const float sign : {1.0f, -1.0f}) {
    Matrix m{8, 768, Values::kInt8, std::vector<float>(8 * 768, 127 * sign), std::vector<float>(8, 1.0f)};
    m.raw[0] = -128;
    const LinearWeights matrix = int8_weights(m, std::vector<float>(8), 0);
    for (const float value : {255.0f, -255.0f}) {
      std::vector<float> x(20 * 768, value);
      x[5] = 0;
      CHECK(multiplied(matrix, Activation::kNone, x, 20, one) == product(m, std::vector<float>(8), x, 20));
    }
  }
}

void tokens_without_a_range() {
  Chance chance(3);
  Threads one;
  const Matrix m = random_blocks(chance, 20, 40, 0.5);
  const std::vector<float> bias = random_vector(chance, 20);
  for (const float value : {0.0f, 1e-40f, -1e-38f}) {
    const std::vector<float> x(5 * 40, value), y = multiplied(int8_weights(m, bias), Activation::kNone, x, 5, one);
    for (size_t i = 0; i < y.size(); i++) CHECK(y[i] == bias[i % 20]);
  }
}

void same_bits_for_all_threads() {
  Chance chance(4);
  const LinearWeights matrix = int8_weights(random_blocks(chance, 400, 1000, 0.15, 0.1f), random_vector(chance, 400));
  for (const size_t n : {1, 17, 64, 130}) {
    const std::vector<float> x = random_vector(chance, n * 1000);
    machine::cores = 1;
    Threads one;
    const std::vector<float> expected = multiplied(matrix, Activation::kGelu, x, n, one);
    for (const unsigned cores : {2u, 8u, 64u})
      for (const size_t threads : {1, 3}) {
        machine::cores = cores;
        Threads some{threads};
        CHECK(multiplied(matrix, Activation::kGelu, x, n, some) == expected);
      }
  }
}

// ---- attention

std::vector<float> round_symmetric(const std::vector<float>& x, float& scale) {
  float largest = 0;
  for (const float v : x) largest = std::max(largest, std::fabs(v));
  scale = largest > 1e-30f ? largest / 127.0f : 1.0f;
  const float reciprocal = 1.0f / scale;
  std::vector<float> rounded;
  for (const float v : x) rounded.push_back(std::nearbyint(v * reciprocal));
  return rounded;
}

// A head of `count` columns that stand in tiles as the widths and offsets say; what lies between is large.
struct Head {
  Head(Chance& chance, size_t count, size_t size, std::vector<size_t> cuts) : rows(size) {
    const size_t lanes = size_t(best_int8_kernels().lanes);
    for (size_t first = 0, t = 0; first < count; t++) {
      const size_t offset = t == 0 ? cuts[0] : 0, upto = t + 1 < cuts.size() ? std::min(count, first + cuts[t + 1]) : count;
      const size_t width = (offset + upto - first + lanes - 1) / lanes * lanes;
      tiles.push_back({std::vector<float>(width * size + 64, 1e6f), offset, width, upto - first});
      for (size_t d = 0; d < size; d++)
        for (size_t c = 0; c < upto - first; c++)
          tiles.back().data[d * width + offset + c] = random_vector(chance, 1, d % 3 ? 0.0f : 0.5f)[0];
      first = upto;
    }
  }

  struct Tile {
    std::vector<float> data;
    size_t offset, width, count;
  };

  float at(size_t d, size_t column) const {
    for (const Tile& tile : tiles) {
      if (column < tile.count) return tile.data[d * tile.width + tile.offset + column];
      column -= tile.count;
    }
    return NAN;
  }

  size_t rows;
  std::vector<Tile> tiles;
};

void attention() {
  const Int8Kernels& k8 = best_int8_kernels();
  const size_t lanes = size_t(k8.lanes);
  Chance chance(21);
  for (const size_t size : {4, 20, 32, 64})
    for (const size_t count : {1, 3, 8, 33, 130})
      for (const size_t query_count : {size_t(1), lanes, 2 * lanes - 1, 3 * lanes, 4 * lanes}) {
        check::where = "heads of " + std::to_string(size) + ", keys " + std::to_string(count) + ", queries " + std::to_string(query_count);
        const std::vector<size_t> cuts = {count % 7, 5, 3 * lanes - 2};
        const Head keys(chance, count, size, cuts);
        const Head values(chance, count, size, cuts);
        const Head queries(chance, query_count, size, {query_count == 1 ? 3u : 0u});
        std::vector<AttentionTask::Keys> stretches;
        for (size_t t = 0; t < keys.tiles.size(); t++)
          stretches.push_back({keys.tiles[t].data.data() + keys.tiles[t].offset,
                               values.tiles[t].data.data() + values.tiles[t].offset, keys.tiles[t].width,
                               uint32_t(keys.tiles[t].count)});
        const size_t words = rounded_keys_words(rounded_keys_width(count, k8.lanes), size, k8.words);
        std::vector<int32_t> place(words, 0x7f7f7f7f);
        const RoundedKeys rounded = rounded_keys(place.data(), count, size, k8.words, k8.lanes);
        k8.round_keys(stretches.data(), uint32_t(stretches.size()), uint32_t(size), rounded);

        const size_t width = (query_count + lanes - 1) / lanes * lanes;
        std::vector<float> context(size * queries.tiles[0].width, -77.0f), scratch(rounded_scores_words(count, width, size, k8.words));
        AttentionTask task{};
        task.query = queries.tiles[0].data.data() + queries.tiles[0].offset;
        task.query_width = task.context_width = queries.tiles[0].width;
        task.context = context.data() + queries.tiles[0].offset;
        task.queries = uint32_t(query_count);
        task.head_size = uint32_t(size);
        task.scores = scratch.data();
        k8.attend(task, rounded);

        std::vector<float> key_scales(count), value_scales(size);
        std::vector<std::vector<float>> key_numbers, value_numbers;
        for (size_t k = 0; k < count; k++) {
          std::vector<float> one;
          for (size_t d = 0; d < size; d++) one.push_back(keys.at(d, k));
          key_numbers.push_back(round_symmetric(one, key_scales[k]));
        }
        for (size_t d = 0; d < size; d++) {
          std::vector<float> one;
          for (size_t k = 0; k < count; k++) one.push_back(values.at(d, k));
          value_numbers.push_back(round_symmetric(one, value_scales[d]));
        }
        for (size_t q = 0; q < query_count; q++) {
          std::vector<float> x;
          for (size_t d = 0; d < size; d++) x.push_back(queries.at(d, q));
          const Rounded query = round_token(x.data(), size);
          std::vector<double> score(count, 0.0);
          for (size_t k = 0; k < count; k++) {
            for (size_t d = 0; d < size; d++) score[k] += (query.values[d] - query.zero) * double(key_numbers[k][d]);
            score[k] *= double(key_scales[k]) * double(query.scale);
          }
          const double most = *std::max_element(score.begin(), score.end());
          double total = 0;
          size_t close = 0;  // probabilities that may be rounded to the other side
          for (double& s : score) {
            const double exact = 255 * std::exp(s - most);
            close += std::fabs(exact - std::floor(exact) - 0.5) < 0.03;
            total += s = std::nearbyint(exact);
          }
          for (size_t d = 0; d < size; d++) {
            double expected = 0, largest = 0;
            for (size_t k = 0; k < count; k++) {
              const double value = double(value_numbers[d][k]) * double(value_scales[d]);
              expected += score[k] / total * value;
              largest = std::max(largest, std::fabs(value));
            }
            CHECK(std::fabs(task.context[d * task.context_width + q] - expected) <= (1e-5 + 2 * double(close) / total) * largest);
          }
        }
        for (size_t i = 0; i < context.size(); i++) {  // nothing else is written
          const size_t column = i % task.context_width, offset = queries.tiles[0].offset;
          if (column < offset || column >= offset + query_count) CHECK(context[i] == -77.0f);
        }
      }
}

// Queries and keys without a range, as those of a row without a real token: all keys count alike.
void attention_to_all_alike() {
  const Int8Kernels& k8 = best_int8_kernels();
  const size_t lanes = size_t(k8.lanes), count = 3;
  const std::vector<float> zeros(4 * lanes + 64, 0.0f);
  std::vector<float> values(4 * lanes + 64, 0.0f), context(4 * lanes), scratch(rounded_scores_words(count, lanes, 4, k8.words));
  for (size_t k = 0; k < count; k++) values[2 * lanes + k] = float(k);
  const AttentionTask::Keys keys{zeros.data(), values.data(), lanes, count};
  std::vector<int32_t> place(rounded_keys_words(rounded_keys_width(count, k8.lanes), 4, k8.words));
  const RoundedKeys rounded = rounded_keys(place.data(), count, 4, k8.words, k8.lanes);
  k8.round_keys(&keys, 1, 4, rounded);
  AttentionTask task{};
  task.query = zeros.data(), task.query_width = lanes, task.context = context.data(), task.context_width = lanes;
  task.queries = 1, task.head_size = 4, task.scores = scratch.data();
  k8.attend(task, rounded);
  CHECK(context[0] == 0.0f && context[lanes] == 0.0f && context[3 * lanes] == 0.0f);
  CHECK(std::fabs(context[2 * lanes] - 1.0f) < 0.01f);
}

// ---- a whole encoder: one form of the kernels against another, and threads against each other

struct Model {
  explicit Model(uint64_t seed, bool mixed, uint32_t hidden = 40, uint32_t inner = 1000) {
    Chance chance(seed);
    const auto add = [&](const Matrix& matrix, int bits, size_t size = 1) { packed.push_back(pack(matrix, bits, size)); };
    const auto numbers = [&](size_t size, float middle) { add(vector_matrix(random_vector(chance, size, middle, 0.3f)), 0); };
    const auto norm = [&] { numbers(hidden, 1.0f), numbers(hidden, 0.0f); };
    size_t count = 0;
    const auto matrix = [&](uint32_t rows, uint32_t columns) {
      if (mixed && count++ % 2) {
        add(random_matrix(chance, rows, columns, Values::kInt8, 0.2, 0.3f), 3);
      } else {
        add(random_blocks(chance, rows, columns, 0.2, 0.3f), 3, 4);
      }
      numbers(rows, 0.0f);
    };
    add(random_matrix(chance, 50, hidden, Values::kInt8, 0.9), 0);
    add(random_matrix(chance, 40, hidden, Values::kInt8, 0.9), 0);
    norm();
    for (int l = 0; l < 2; l++) {
      for (int n = 0; n < 4; n++) matrix(hidden, hidden);
      norm();
      matrix(inner, hidden);
      matrix(hidden, inner);
      norm();
    }
  }

  std::unique_ptr<Encoder> encoder(bool first_only) const {
    EncoderShape shape;
    shape.heads = 4, shape.layers = 2, shape.reads = first_only ? Reads::kFirst : Reads::kEvery, shape.epsilon = 1e-5f;
    size_t index = 0;
    return std::make_unique<Encoder>(shape, best_machine(), [&](const std::string& name) {
      const Bytes& bytes = packed.at(index++);
      return open(bytes.data(), bytes.size(), name);
    });
  }

  std::vector<Bytes> packed;
};

std::vector<float> hidden_states(const Model& model, size_t batch, size_t length, bool first, Lender lender) {
  Chance chance(batch * 100 + length);
  std::vector<int64_t> ids, mask;
  for (size_t i = 0; i < batch * length; i++) {
    ids.push_back(int64_t(chance.below(50)));
    mask.push_back(i % length == 0 || chance.below(4) != 0);
  }
  const auto encoder = model.encoder(first);
  std::vector<float> out(batch * (first ? 1 : length) * encoder->hidden());
  encoder->run({ids.data(), mask.data(), nullptr, batch, length}, out.data(), lender);
  // Hidden positions are not computed where only token 0 is wanted, and are of no interest elsewhere.
  for (size_t i = 0; i < out.size(); i++)
    if (!first && !mask[i / encoder->hidden()]) out[i] = 0;
  return out;
}

void threads_of_an_encoder() {
  for (const bool mixed : {false, true}) {
    const Model model(7, mixed);
    for (const bool first : {false, true})
      for (const auto& [batch, length] : {std::pair<size_t, size_t>{1, 1}, {1, 30}, {9, 17}}) {
        machine::cores = 1;
        Threads one;
        const std::vector<float> expected = hidden_states(model, batch, length, first, one);
        for (const float x : expected) CHECK(std::isfinite(x));
        for (const unsigned cores : {2u, 8u, 64u})
          for (const size_t threads : {1, 3}) {
            machine::cores = cores;
            Threads some{threads};
            CHECK(hidden_states(model, batch, length, first, some) == expected);
          }
      }
  }
}

// Integers are the same in every form, and the rest is the same code: the results have the same bits.
void forms_agree() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2")) return;
  const char* before = std::getenv("SPDTOOL_SPARSE_CPU_ISA");
  const std::string restored = before ? before : "";
  machine::cores = 1;
  Threads one;
  const Model model(8, false);
  for (const bool first : {false, true}) {
    setenv("SPDTOOL_SPARSE_CPU_ISA", "avx2", 1);
    CHECK(std::string(best_int8_kernels().name) == "avx2" && best_int8_kernels().words == 2);
    const std::vector<float> expected = hidden_states(model, 6, 13, first, one);
    for (const char* form : {"emulated", "avx_vnni"}) {
      setenv("SPDTOOL_SPARSE_CPU_ISA", form, 1);
      if (std::string(form) == "emulated")
        CHECK(std::string(best_int8_kernels().name) == form && best_int8_kernels().words == 1);
      CHECK(hidden_states(model, 6, 13, first, one) == expected);
    }
  }
  setenv("SPDTOOL_SPARSE_CPU_ISA", restored.c_str(), 1);
#endif
}

void damage() {
  Chance chance(9);
  const auto read = [](Bytes bytes) {
    seal(bytes);
    read_groups(open(bytes.data(), bytes.size(), "w"));
  };
  const Bytes sound = pack(random_blocks(chance, 4, 16, 0.5), 2, 4);
  read(sound);
  Bytes bytes = sound;
  bytes[7] = 1;
  CHECK_REFUSED(PackedError, read(bytes), "blocks of 2^1 inputs");
  bytes = sound;
  bytes[5] = 0;
  CHECK_REFUSED(PackedError, read(bytes), "blocks of 2^2 inputs");
  bytes = sound;
  put<uint32_t>(bytes, 12, 18);
  CHECK_REFUSED(PackedError, read(bytes), "18 columns");
  bytes = sound;
  put<uint64_t>(bytes, 16, 6);
  CHECK_REFUSED(PackedError, read(bytes), "6 values");
  for (const uint32_t scale : {0u, 0x80000000u, 0xbf800000u, 0x7f800000u, 0x7fc00000u}) {
    bytes = sound;
    put<uint32_t>(bytes, 64, scale);
    CHECK_REFUSED(PackedError, read(bytes), "a scale that is not a positive number");
  }
  bytes = sound;
  for (int i = 0; i < 4; i++) bytes[64 + 16 + i] = 0;
  CHECK_REFUSED(PackedError, read(bytes), "a stored value is zero");
  bytes = sound;
  std::fill(bytes.end() - 2, bytes.end(), uint8_t(0xff));
  CHECK_REFUSED(PackedError, read(bytes), "position");
  const Bytes single = pack(random_matrix(chance, 4, 16, Values::kInt8, 0.5), 2);
  CHECK_REFUSED(PackedError, read(single), "single weights");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"odd shapes", odd_shapes},
                     {"integers are exact", integers_are_exact},
                     {"extremes", extremes},
                     {"tokens without a range", tokens_without_a_range},
                     {"same bits for all threads", same_bits_for_all_threads},
                     {"attention", attention},
                     {"attention to all alike", attention_to_all_alike},
                     {"threads of an encoder", threads_of_an_encoder},
                     {"forms agree", forms_agree},
                     {"damage", damage}},
                    count, arguments);
}
