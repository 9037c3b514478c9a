// The whole encoder against a slow one in double precision.
#include "slow_encoder.hpp"

using namespace slow;

namespace {

const std::vector<Config> kConfigs = {
    {"hidden 20", 20, 4, 36, 2},
    {"hidden 36, projected, tanh", 36, 4, 50, 2, 12, true, -1, Activation::kGeluTanh},
    {"hidden 21, RoBERTa, fp16", 21, 3, 200, 1, 0, false, 1, Activation::kGelu, Values::kFloat16, Values::kFloat16},
    {"hidden 20, int6, relu", 20, 1, 70, 2, 0, true, -1, Activation::kRelu, Values::kInt6, Values::kInt8},
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
