// Encoders of other kinds than BERT's, and what heads read of them, against a slow one in double precision.
#include "slow_encoder.hpp"

using namespace slow;

namespace {

Config of_kind(LayerKind kind, const char* name, const char* attention = "") {
  Config config{name, 24, 3, 40, 3};
  config.kind = kind;
  config.attention = attention;
  config.padding_id = kind == LayerKind::kMpnet ? 1 : -1;
  config.token_types = kind == LayerKind::kDeberta;
  return config;
}

std::vector<Config> kinds() {
  std::vector<Config> all = {of_kind(LayerKind::kBert, "BERT"), of_kind(LayerKind::kMpnet, "MPNet"),
                             of_kind(LayerKind::kDeberta, "DeBERTa"), of_kind(LayerKind::kModernBert, "ModernBERT", "glg"),
                             of_kind(LayerKind::kModernBert, "ModernBERT, tanh", "lgl"),
                             of_kind(LayerKind::kModernBert, "ModernBERT, inner 400", "gll")};
  all[4].activation = Activation::kGeluTanh;
  all[4].values = all[4].tables = Values::kFloat16;
  all[5].inner = 400;
  all[5].values = Values::kInt8;
  all[5].window = 0;
  return all;
}

constexpr Reads kReads[] = {Reads::kFirst, Reads::kMean, Reads::kReal, Reads::kEvery};

void every_kind() {
  uint64_t seed = 1;
  for (const Config& config : kinds()) {
    const Model model(config, seed++);
    Chance chance(seed);
    for (const Reads reads : kReads)
      for (const unsigned cores : {1u, 64u}) {  // tiles are shared, or their rows are
        machine::cores = cores;
        const auto encoder = model.encoder(reads);
        const std::pair<size_t, size_t> sizes[] = {{3, 5}, {1, 1}, {7, 11}, {2, 36}};
        for (const auto& [rows, length] : sizes)
          for (int mask = rows == 3 ? 0 : int(Mask::kMixed); mask <= int(Mask::kMixed); mask++) {
            const Batch batch = make_batch(chance, rows, length, Mask(mask), config.padding_id);
            check::where = std::string(config.name) + ", " + std::to_string(rows) + " x " + std::to_string(length) +
                           ", mask " + std::to_string(mask) + ", reads " + std::to_string(int(reads));
            compare(model, *encoder, batch, 2);
          }
      }
  }
}

// Sequences of many tiles, longer than the table of distances and than a window.
void long_sequences() {
  uint64_t seed = 30;
  for (Config config : kinds()) {
    const bool plain = config.kind == LayerKind::kBert || std::string(config.attention) == "lgl";  // whose keys come in two chunks
    const size_t length = plain ? 600 : 190;
    config.positions = 800;
    config.layers = 1;
    config.attention = config.attention[0] ? (plain ? "g" : "l") : "";
    config.window = 40;
    const Model model(config, seed++);
    Chance chance(seed);
    machine::cores = 2;
    for (const Reads reads : {Reads::kFirst, Reads::kReal}) {
      const auto encoder = model.encoder(reads);
      for (const Mask mask : {Mask::kFull, Mask::kHoles}) {
        check::where = std::string(config.name) + ", long, mask " + std::to_string(int(mask));
        compare(model, *encoder, make_batch(chance, 1, length, mask, config.padding_id), 1);
      }
    }
  }
}

// The same in 8 bits, with an inner width of two chunks.
void in_blocks() {
  uint64_t seed = 200;
  for (Config config : kinds()) {
    config.blocks = true;
    config.layers = 2;
    config.attention = config.attention[0] ? "gl" : "";
    config.inner = 800;
    const Model model(config, seed++);
    Chance chance(seed);
    for (const Reads reads : {Reads::kFirst, Reads::kReal})
      for (const unsigned cores : {1u, 64u}) {
        machine::cores = cores;
        const auto encoder = model.encoder(reads);
        for (const Mask mask : {Mask::kRight, Mask::kLeft}) {
          check::where = std::string(config.name) + ", blocks, mask " + std::to_string(int(mask));
          compare(model, *encoder, make_batch(chance, 3, 9, mask, config.padding_id), 3);
        }
      }
  }
}

void same_bits_for_all_threads() {
  uint64_t seed = 60;
  for (const Config& config : kinds()) {
    const Model model(config, seed++);
    Chance chance(seed);
    const Batch batch = make_batch(chance, 9, 17, Mask::kMixed, config.padding_id);
    for (const Reads reads : kReads) {
      check::where = std::string(config.name) + ", threads, reads " + std::to_string(int(reads));
      std::vector<float> expected;
      for (const unsigned cores : {1u, 64u})
        for (const size_t threads : {1, 3}) {
          machine::cores = cores;
          const auto encoder = model.encoder(reads);
          Threads some{threads, threads == 3 ? 50u : 0};
          for (int again = 0; again < 2; again++) {  // the first batch tells how many threads there are
            const std::vector<float> found = computed(*encoder, batch, some);
            if (expected.empty()) expected = found;
            CHECK(found == expected);
          }
        }
    }
  }
}

void two_callers_at_once() {
  uint64_t seed = 70;
  machine::cores = 4;
  for (const Config& config : kinds()) {
    const Model model(config, seed++);
    Chance chance(seed);
    const auto encoder = model.encoder(Reads::kReal);
    const Batch batches[] = {make_batch(chance, 3, 9, Mask::kMixed, config.padding_id),
                             make_batch(chance, 5, 21, Mask::kRight, config.padding_id)};
    Threads one;
    const std::vector<float> expected[] = {computed(*encoder, batches[0], one), computed(*encoder, batches[1], one)};
    std::vector<int> wrong(2, 0);
    std::vector<std::thread> callers;
    for (size_t c = 0; c < 2; c++)
      callers.emplace_back([&, c] {
        Threads two{2};
        for (size_t i = c; i < c + 6; i++) wrong[c] += computed(*encoder, batches[i % 2], two) != expected[i % 2];
      });
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == std::vector<int>(2, 0));
  }
}

void bad_attributes() {
  const auto refuses = [](const Config& config, const char* text) {
    const Model model(config, 5);
    CHECK_REFUSED(PackedError, model.encoder(Reads::kFirst), text);
  };
  for (const char* attention : {"gl", "glgl", "glx"}) {
    Config config = of_kind(LayerKind::kModernBert, "attention", attention);
    refuses(config, "the attention of 3 layers is");
  }
  Config window = of_kind(LayerKind::kModernBert, "window", "glg");
  window.window = -1;
  refuses(window, "a window of -1");
  Config odd = of_kind(LayerKind::kModernBert, "odd heads", "glg");
  odd.hidden = 21;
  refuses(odd, "heads of 7 numbers cannot be rotated");
}

// One row or column more, wherever it is, and buckets that are none.
void bad_weights() {
  for (const Config& config : kinds()) {
    const Model good(config, 90);
    for (size_t i = 0; i < good.packed.size(); i++)
      for (const bool wider : {true, false}) {
        Model bad = good;
        const Matrix& m = good.plain[i];
        const uint32_t rows = m.rows + !wider, columns = m.columns + wider;
        if (!wider && i < (config.kind == LayerKind::kBert ? 3u : 2u)) continue;  // tables may have any number of rows
        if (wider && m.rows == 1 && m.columns == 2 * kDistances + 1) continue;    // refused below
        if (!wider && m.rows == kBuckets) continue;
        if (!wider && m.rows == config.positions) continue;
        bad.packed[i] = pack({rows, columns, Values::kFloat32, std::vector<float>(rows * columns, 1.0f), {}}, 0);
        check::where = std::string(config.name) + ", parameter " + std::to_string(i);
        CHECK_REFUSED(PackedError, bad.encoder(Reads::kReal), "");
      }
    for (size_t i = 0; i < good.packed.size(); i++) {
      if (good.plain[i].rows != 1 || good.plain[i].columns != 2 * kDistances + 1) continue;
      const std::vector<float> buckets = good.plain[i].all();
      for (const float number : {-1.0f, float(kBuckets), 0.5f, 1e30f}) {
        Model bad = good;
        std::vector<float> numbers = buckets;
        numbers[3] = number;
        bad.packed[i] = pack(vector_matrix(numbers), 0);
        CHECK_REFUSED(PackedError, bad.encoder(Reads::kReal), "buckets of distances");
      }
      Model even = good;
      even.packed[i] = pack(vector_matrix(std::vector<float>(2 * kDistances, 0.0f)), 0);
      CHECK_REFUSED(PackedError, even.encoder(Reads::kReal), "not as many before 0");
      if (config.kind != LayerKind::kDeberta) continue;
      Model falling = good;
      falling.packed[i] = pack(vector_matrix(std::vector<float>(buckets.rbegin(), buckets.rend())), 0);
      CHECK_REFUSED(PackedError, falling.encoder(Reads::kReal), "do not ascend");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"every kind", every_kind},
                     {"long sequences", long_sequences},
                     {"in blocks", in_blocks},
                     {"same bits for all threads", same_bits_for_all_threads},
                     {"two callers at once", two_callers_at_once},
                     {"bad attributes", bad_attributes},
                     {"bad weights", bad_weights}},
                    count, arguments);
}
