// The whole encoder against a slow one in double precision.
#include "encoder.hpp"

#include <tuple>


#include "machine.hpp"
#include "plain.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {


// A test case: the widths of an encoder, and how its weights are stored.
struct Config {
  const char* name;
  size_t hidden, heads, inner, layers;
  size_t embedding = 0;  // not 0: with a projection from this width
  bool token_types = true;
  int64_t padding_id = -1;
  Activation activation = Activation::kGelu;
  Values tables = Values::kFloat32, values = Values::kFloat32;
  double density = 0.2;
  size_t positions = 40;
};

constexpr uint32_t kWords = 50, kTypes = 2;

// A model's parameters in the order of the operator, plain and packed.
struct Model {
  Model(const Config& config, uint64_t seed) : config(config) {
    Chance chance(seed);
    const uint32_t hidden = uint32_t(config.hidden), inner = uint32_t(config.inner);
    const uint32_t width = config.embedding ? uint32_t(config.embedding) : hidden;
    const auto table = [&](uint32_t rows) { add(random_matrix(chance, rows, width, config.tables, 0.9), 0); };
    const auto numbers = [&](size_t size, float middle) {
      add(vector_matrix(random_vector(chance, size, middle, 0.3f)), 0);
    };
    const auto norm = [&](size_t size) { numbers(size, 1.0f), numbers(size, 0.0f); };
    const auto linear = [&](uint32_t rows, uint32_t columns) {
      const float spread = 1.5f / std::sqrt(float(columns) * float(config.density) + 0.1f);
      add(random_matrix(chance, rows, columns, config.values, config.density, spread), 1 + int(chance.below(8)));
      numbers(rows, 0.0f);
    };
    table(kWords);
    table(uint32_t(config.positions));
    if (config.token_types) table(kTypes);
    norm(width);
    if (config.embedding) linear(hidden, width);
    for (size_t l = 0; l < config.layers; l++) {
      for (int n = 0; n < 4; n++) linear(hidden, hidden);
      norm(hidden);
      linear(inner, hidden);
      linear(hidden, inner);
      norm(hidden);
    }
  }

  void add(const Matrix& matrix, int gap_bits) {
    plain.push_back(matrix);
    packed.push_back(pack(matrix, gap_bits));
  }

  EncoderShape shape(bool first_only) const {
    EncoderShape shape;
    shape.heads = config.heads;
    shape.layers = config.layers;
    shape.epsilon = epsilon;
    shape.activation = config.activation;
    shape.padding_id = config.padding_id;
    shape.token_types = config.token_types;
    shape.projection = config.embedding != 0;
    shape.first_only = first_only;
    return shape;
  }

  std::unique_ptr<Encoder> encoder(bool first_only) const {
    size_t index = 0;
    return std::make_unique<Encoder>(shape(first_only), best_machine(), [&](const std::string& name) {
      const Bytes& bytes = packed.at(index++);
      return open(bytes.data(), bytes.size(), name);
    });
  }

  Config config;
  float epsilon = 1e-5f;
  std::vector<Matrix> plain;
  std::vector<Bytes> packed;
};

struct Batch {
  size_t batch, length;
  std::vector<int64_t> ids, mask, types;

  Tokens tokens(bool with_types = true) const {
    return {ids.data(), mask.data(), with_types ? types.data() : nullptr, batch, length};
  }
};

enum class Mask { kFull, kRight, kLeft, kHoles, kNothing, kFirstHidden, kMixed };

Batch make_batch(Chance& chance, size_t batch, size_t length, Mask mask, int64_t padding_id) {
  Batch made{batch, length, {}, {}, {}};
  for (size_t b = 0; b < batch; b++) {
    const size_t real = 1 + chance.below(length);
    const Mask kind = mask == Mask::kMixed ? Mask(chance.below(6)) : mask;
    for (size_t s = 0; s < length; s++) {
      bool shown = true;
      if (kind == Mask::kRight) shown = s < real;
      if (kind == Mask::kLeft) shown = s >= length - real;
      if (kind == Mask::kHoles) shown = chance.below(3) != 0;
      if (kind == Mask::kNothing) shown = false;
      if (kind == Mask::kFirstHidden) shown = s != 0;
      int64_t id = int64_t(chance.below(kWords));
      if (padding_id >= 0) id = shown && id == padding_id ? id + 1 : shown ? id : padding_id;
      made.ids.push_back(id);
      made.mask.push_back(shown);
      made.types.push_back(int64_t(chance.below(kTypes)));
    }
  }
  return made;
}

// ---- the slow encoder: one row of the batch, tokens as rows of numbers

using Table = std::vector<std::vector<double>>;

class Slow {
 public:
  Slow(const Model& model, const Batch& batch, size_t row, bool types)
      : model_(model), ids_(&batch.ids[row * batch.length]), mask_(&batch.mask[row * batch.length]),
        types_(types ? &batch.types[row * batch.length] : nullptr), length_(batch.length) {}

  Table run() {
    const Config& c = model_.config;
    const Matrix &words = next(), &positions = next();
    const Matrix* types = c.token_types ? &next() : nullptr;
    Table x(length_, std::vector<double>(words.columns));
    int64_t count = 0;
    for (size_t s = 0; s < length_; s++) {
      count += ids_[s] != c.padding_id;
      const int64_t place = c.padding_id < 0            ? int64_t(s)
                            : ids_[s] == c.padding_id ? c.padding_id
                                                        : c.padding_id + count;
      for (size_t i = 0; i < x[s].size(); i++) {
        x[s][i] = double(words.at(size_t(ids_[s]), i)) + double(positions.at(size_t(place), i));
        if (types) x[s][i] += double(types->at(types_ ? size_t(types_[s]) : 0, i));
      }
    }
    norm(x);
    if (c.embedding) x = linear(x);
    for (size_t l = 0; l < c.layers; l++) {
      const Table query = linear(x), key = linear(x), value = linear(x);
      const Table mixed = attention(query, key, value);
      add(x, linear(mixed));
      norm(x);
      Table inner = linear(x);
      for (auto& token : inner)
        for (double& v : token) v = activated(v);
      add(x, linear(inner));
      norm(x);
    }
    CHECK(at_ == model_.plain.size());
    return x;
  }

 private:
  const Matrix& next() { return model_.plain[at_++]; }

  double activated(double x) const {
    switch (model_.config.activation) {
      case Activation::kRelu: return x > 0 ? x : 0;
      case Activation::kGelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kGeluTanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
      default: return x;
    }
  }

  Table linear(const Table& x) {
    const Matrix &weight = next(), &bias = next();
    Table y(x.size(), std::vector<double>(weight.rows));
    const std::vector<float> w = weight.all();
    for (size_t s = 0; s < x.size(); s++)
      for (size_t r = 0; r < weight.rows; r++) {
        double sum = bias.at(0, r);
        for (size_t c = 0; c < weight.columns; c++) sum += double(w[r * weight.columns + c]) * x[s][c];
        y[s][r] = sum;
      }
    return y;
  }

  static void add(Table& x, const Table& y) {
    for (size_t s = 0; s < x.size(); s++)
      for (size_t i = 0; i < x[s].size(); i++) x[s][i] += y[s][i];
  }

  void norm(Table& x) {
    const Matrix &gain = next(), &bias = next();
    for (auto& token : x) {
      double mean = 0, square = 0;
      for (const double v : token) mean += v / double(token.size());
      for (const double v : token) square += (v - mean) * (v - mean) / double(token.size());
      for (size_t i = 0; i < token.size(); i++)
        token[i] = (token[i] - mean) / std::sqrt(square + double(1e-5f)) * gain.at(0, i) + bias.at(0, i);
    }
  }

  Table attention(const Table& query, const Table& key, const Table& value) const {
    const size_t hidden = model_.config.hidden, heads = model_.config.heads, size = hidden / heads;
    bool blind = true;
    for (size_t s = 0; s < length_; s++) blind = blind && !mask_[s];
    Table mixed(length_, std::vector<double>(hidden, 0.0));
    for (size_t h = 0; h < heads; h++)
      for (size_t q = 0; q < length_; q++) {
        std::vector<double> score(length_, 0.0);
        double total = 0, most = -INFINITY;
        for (size_t k = 0; k < length_; k++) {
          if (!blind && !mask_[k]) continue;
          for (size_t d = h * size; d < (h + 1) * size && !blind; d++) score[k] += query[q][d] * key[k][d];
          score[k] /= std::sqrt(double(size));
          most = std::max(most, score[k]);
        }
        for (size_t k = 0; k < length_; k++) {
          score[k] = blind || mask_[k] ? std::exp(score[k] - most) : 0;
          total += score[k];
        }
        for (size_t k = 0; k < length_; k++)
          for (size_t d = h * size; d < (h + 1) * size; d++) mixed[q][d] += score[k] / total * value[k][d];
      }
    return mixed;
  }

  const Model& model_;
  const int64_t *ids_, *mask_, *types_;
  const size_t length_;
  size_t at_ = 0;
};

// ---- comparing

std::vector<float> computed(const Encoder& encoder, const Batch& batch, Lender lender, bool types = true) {
  const size_t columns = encoder.first_only() ? batch.batch : batch.batch * batch.length;
  std::vector<float> out(columns * encoder.hidden(), -77.0f);
  encoder.run(batch.tokens(types), out.data(), lender);
  return out;
}

// Compares some rows of the batch, at most `most`, with the slow encoder.
void compare(const Model& model, const Encoder& encoder, const Batch& batch, size_t most, bool types = true) {
  Threads one;
  const std::vector<float> found = computed(encoder, batch, one, types);
  const size_t hidden = encoder.hidden(), width = encoder.first_only() ? hidden : batch.length * hidden;
  const size_t step = (batch.batch + most - 1) / most;
  for (size_t b = 0; b < batch.batch; b += step) {
    const Table rows = Slow(model, batch, b, types).run();
    std::vector<double> expected;
    for (size_t s = 0; s < (encoder.first_only() ? 1 : batch.length); s++)
      expected.insert(expected.end(), rows[s].begin(), rows[s].end());
    CHECK_CLOSE(std::vector<float>(&found[b * width], &found[b * width] + width), expected, 3e-5);
  }
}

const std::vector<Config> kConfigs = {
    {"hidden 20", 20, 4, 36, 2},
    {"hidden 36, projected, tanh", 36, 4, 50, 2, 12, true, -1, Activation::kGeluTanh},
    {"hidden 21, RoBERTa, fp16", 21, 3, 200, 1, 0, false, 1, Activation::kGelu, Values::kFloat16, Values::kFloat16},
    {"hidden 20, int8, relu", 20, 1, 70, 2, 0, true, -1, Activation::kRelu, Values::kInt8, Values::kInt8},
    {"inner 400", 24, 8, 400, 1, 0, false, 0, Activation::kGelu, Values::kInt8, Values::kFloat16},
    {"hidden 200", 200, 8, 390, 1, 0, true, -1, Activation::kGelu, Values::kFloat16, Values::kFloat32, 0.1},
    {"dense", 20, 2, 210, 1, 0, true, -1, Activation::kGelu, Values::kFloat32, Values::kFloat32, 1.0},
    {"all zero", 20, 2, 24, 2, 0, true, -1, Activation::kGelu, Values::kFloat32, Values::kFloat32, 0.0},
};

std::string named(const char* name, const Batch& batch, Mask mask, bool first) {
  return std::string(name) + ", " + std::to_string(batch.batch) + " x " + std::to_string(batch.length) + ", mask " +
         std::to_string(int(mask)) + (first ? ", first" : ", all");
}

void every_configuration() {
  uint64_t seed = 1;
  for (const Config& config : kConfigs) {
    const Model model(config, seed++);
    Chance chance(seed);
    for (const bool first : {false, true})
      for (const unsigned cores : {1u, 64u}) {  // tiles are shared, or their rows are
        machine::cores = cores;
        const auto encoder = model.encoder(first);
        const std::pair<size_t, size_t> sizes[] = {{1, 1}, {1, 2}, {1, 17}, {3, 5}, {2, 32}, {7, 11}};
        for (const auto& [rows, length] : sizes)
          for (const Mask mask : {Mask::kFull, Mask::kMixed}) {
            const Batch batch = make_batch(chance, rows, length, mask, config.padding_id);
            check::where = named(config.name, batch, mask, first);
            compare(model, *encoder, batch, config.hidden > 100 ? 1 : 3);
          }
      }
  }
}

void every_mask() {
  const Model model({"masks", 20, 4, 36, 2}, 20), roberta({"roberta", 20, 4, 36, 2, 0, false, 3}, 21);
  Chance chance(22);
  for (const unsigned cores : {1u, 2u})
    for (const bool first : {false, true}) {
      machine::cores = cores;
      const auto encoder = model.encoder(first), other = roberta.encoder(first);
      for (int mask = 0; mask <= int(Mask::kMixed); mask++)
        for (const size_t rows : {1, 5, 40})
          for (const size_t length : {1, 6, 33}) {
            Batch batch = make_batch(chance, rows, length, Mask(mask), -1);
            check::where = named("masks", batch, Mask(mask), first);
            compare(model, *encoder, batch, 3);
            batch = make_batch(chance, rows, length, Mask(mask), 3);
            check::where = named("roberta", batch, Mask(mask), first);
            compare(roberta, *other, batch, 3);
          }
    }
}

// One encoder, batches that grow and shrink: stale numbers of one in a buffer must not show in the next.
void one_after_the_other() {
  const Model model({"sizes", 20, 4, 36, 2}, 30);
  Chance chance(31);
  machine::cores = 2;
  for (const bool first : {false, true}) {
    const auto encoder = model.encoder(first);
    for (int again = 0; again < 25; again++) {
      const Batch batch = make_batch(chance, 1 + chance.below(20), 1 + chance.below(40), Mask::kMixed, -1);
      check::where = named("sizes", batch, Mask::kMixed, first);
      compare(model, *encoder, batch, 2);
    }
  }
}

void without_token_types() {
  const Model model({"types", 20, 4, 36, 1}, 40);
  Chance chance(41);
  const auto encoder = model.encoder(false);
  const Batch batch = make_batch(chance, 3, 9, Mask::kRight, -1);
  compare(model, *encoder, batch, 3, false);
  Batch first = batch;
  std::fill(first.types.begin(), first.types.end(), 0);
  Threads one;
  CHECK(computed(*encoder, first, one) == computed(*encoder, batch, one, false));
}

void long_batches() {
  Config config{"long", 20, 4, 24, 1};
  config.positions = 512;
  const Model model(config, 50);
  Chance chance(51);
  machine::cores = 2;
  for (const bool first : {false, true}) {
    const auto encoder = model.encoder(first);
    for (const Mask mask : {Mask::kFull, Mask::kRight}) {
      const Batch batch = make_batch(chance, 64, 512, mask, -1);
      check::where = named("long", batch, mask, first);
      compare(model, *encoder, batch, 1);
    }
  }
}

void same_bits_for_all_threads() {
  const Model model({"threads", 40, 4, 400, 2}, 60);
  Chance chance(61);
  const std::pair<size_t, size_t> sizes[] = {{1, 1}, {1, 30}, {9, 17}, {40, 12}};
  for (const auto& [rows, length] : sizes)
    for (const bool first : {false, true}) {
      const Batch batch = make_batch(chance, rows, length, Mask::kMixed, -1);
      check::where = named("threads", batch, Mask::kMixed, first);
      std::vector<float> expected;
      for (const unsigned cores : {1u, 2u, 3u, 8u, 64u})
        for (const size_t threads : {1, 2, 3, 8}) {
          machine::cores = cores;
          const auto encoder = model.encoder(first);
          Threads some{threads, threads == 3 ? 50u : 0};
          for (int again = 0; again < 3; again++) {  // the first batch tells how many threads there are
            const std::vector<float> found = computed(*encoder, batch, some);
            if (expected.empty()) expected = found;
            CHECK(found == expected);
          }
        }
    }
}

void two_callers_at_once() {
  const Model model({"callers", 40, 4, 200, 2}, 70);
  Chance chance(71);
  machine::cores = 4;
  for (const bool first : {false, true}) {
    const auto encoder = model.encoder(first), alone = model.encoder(first);
    std::vector<Batch> batches;
    std::vector<std::vector<float>> expected;
    Threads one;
    for (size_t i = 0; i < 6; i++) {
      batches.push_back(make_batch(chance, 1 + 3 * i, 5 + i, Mask::kMixed, -1));
      expected.push_back(computed(*alone, batches.back(), one));
    }
    std::vector<int> wrong(2, 0);
    std::vector<std::thread> callers;
    for (size_t c = 0; c < 2; c++)
      callers.emplace_back([&, c] {
        Threads two{2};
        for (size_t i = 0; i < 18; i++)
          wrong[c] += computed(*encoder, batches[(i + c) % 6], two) != expected[(i + c) % 6];
      });
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == std::vector<int>(2, 0));
  }
}

// ---- refusals

void bad_input() {
  machine::cores = 2;
  const Model model({"input", 20, 4, 36, 1}, 80), roberta({"roberta", 20, 4, 36, 1, 0, false, 1}, 81);
  Chance chance(82);
  const auto encoder = model.encoder(false), other = roberta.encoder(true);
  Threads one;
  const Batch good = make_batch(chance, 2, 5, Mask::kFull, -1);
  for (const int64_t bad : {int64_t(-1), int64_t(kWords), INT64_MAX, INT64_MIN}) {
    Batch batch = good;
    batch.ids[7] = bad;
    CHECK_REFUSED(InputError, computed(*encoder, batch, one), "token id " + std::to_string(bad));
    batch.mask[7] = 0;  // hidden or not
    CHECK_REFUSED(InputError, computed(*encoder, batch, one), "token id");
  }
  for (const int64_t bad : {int64_t(-1), int64_t(kTypes), INT64_MAX}) {
    Batch batch = good;
    batch.types[9] = bad;
    CHECK_REFUSED(InputError, computed(*encoder, batch, one), "token type " + std::to_string(bad));
    computed(*other, batch, one);  // a model without token types does not look at them
  }
  computed(*encoder, make_batch(chance, 1, 40, Mask::kFull, -1), one);
  CHECK_REFUSED(InputError, computed(*encoder, make_batch(chance, 1, 41, Mask::kFull, -1), one),
                "a sequence of 41 tokens is longer than the model's 40 positions");
  computed(*other, make_batch(chance, 1, 38, Mask::kFull, 1), one);  // positions 2 to 39
  CHECK_REFUSED(InputError, computed(*other, make_batch(chance, 1, 39, Mask::kFull, 1), one), "the model's 38 positions");
  compare(model, *encoder, good, 2);  // and goes on
  float untouched = 5;
  encoder->run({nullptr, nullptr, nullptr, 0, 5}, &untouched, one);
  encoder->run({nullptr, nullptr, nullptr, 5, 0}, &untouched, one);
  CHECK(untouched == 5);
}

void bad_attributes() {
  const Model good({"attributes", 20, 4, 36, 2}, 91);
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY, -1e-12f}) {
    Model model = good;
    model.epsilon = bad;
    CHECK_REFUSED(PackedError, model.encoder(false), "no small number above zero");
  }
}

void bad_weights() {
  const Model good({"weights", 20, 4, 36, 2}, 90);
  for (size_t i = 0; i < good.packed.size(); i++) {  // one more column, wherever it is
    Model bad = good;
    Matrix& m = bad.plain[i];
    m = Matrix{m.rows, m.columns + 1, Values::kFloat32, std::vector<float>(m.rows * (m.columns + 1), 1.0f), {}};
    bad.packed[i] = pack(m, 0);
    CHECK_REFUSED(PackedError, bad.encoder(false), "");
  }
  for (const size_t i : {size_t(5), size_t(7), size_t(15), size_t(17), size_t(33)}) {  // one more row
    Model bad = good;
    Matrix& m = bad.plain[i];
    m = Matrix{m.rows + 1, m.columns, Values::kFloat32, std::vector<float>((m.rows + 1) * m.columns, 1.0f), {}};
    bad.packed[i] = pack(m, 0);
    CHECK_REFUSED(PackedError, bad.encoder(false), "");
  }
  // Millions of rows without a value, in 64 bytes: refused before room is made for them.
  Model huge = good;
  put<uint32_t>(huge.packed[15], 8, 1u << 25);
  put<uint64_t>(huge.packed[15], 16, 0);
  put<uint64_t>(huge.packed[15], 24, 0);
  huge.packed[15].resize(64);
  seal(huge.packed[15]);
  CHECK_REFUSED(PackedError, huge.encoder(false), "is needed");

  for (const auto& [heads, layers, padding] :
       {std::tuple(3, 2, -1), std::tuple(0, 2, -1), std::tuple(4, 0, -1), std::tuple(4, 2, -2), std::tuple(4, 2, 40)}) {
    Model bad = good;
    bad.config.heads = size_t(heads);
    bad.config.layers = size_t(layers);
    bad.config.padding_id = padding;
    CHECK_REFUSED(PackedError, bad.encoder(false), "");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"every configuration", every_configuration},
                     {"every mask", every_mask},
                     {"one after the other", one_after_the_other},
                     {"without token types", without_token_types},
                     {"long batches", long_batches},
                     {"same bits for all threads", same_bits_for_all_threads},
                     {"two callers at once", two_callers_at_once},
                     {"bad input", bad_input},
                     {"bad attributes", bad_attributes},
                     {"bad weights", bad_weights}},
                    count, arguments);
}
