// Feeds mutated packed matrices to the readers. Each must give a PackedError or a sound matrix; anything else stops the
// process.
//
//     test_fuzz SEED ITERATIONS
//
// With clang, -DSPARSE_CPU_LIBFUZZER -fsanitize=fuzzer makes it a libFuzzer target instead.
#include "blocked.hpp"
#include "int8_matrix.hpp"
#include "plain.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

size_t accepted = 0, refused = 0;

void must(bool sound, const char* what) {
  if (sound) return;
  std::printf("unsound: %s\n", what);
  std::abort();
}

void check_rows(const Packed& packed) {
  // Rows without a value cost no bytes. The encoder has read a bias of as many numbers before it reads a matrix.
  if (packed.rows > 1u << 16) return;
  const SparseRows rows = read_rows(packed);
  must(rows.start.size() == size_t(packed.rows) + 1 && rows.start[0] == 0, "where rows start");
  must(rows.start.back() == rows.value.size() && rows.column.size() == rows.value.size(), "how many values");
  for (size_t r = 0; r < packed.rows; r++) {
    must(rows.start[r] <= rows.start[r + 1], "order of rows");
    for (size_t i = rows.start[r]; i < rows.start[r + 1]; i++) {
      must(rows.column[i] < packed.columns && (i == rows.start[r] || rows.column[i - 1] < rows.column[i]), "columns");
      must(std::isfinite(rows.value[i]), "values");
    }
  }
  if (uint64_t(packed.rows) * packed.columns > 1u << 16) return;
  const BlockedMatrix matrix(rows, std::vector<float>(packed.rows, 0.0f), 0.5);
  must(matrix.nonzeros() == rows.value.size(), "blocks");
}

void check_groups(const Packed& packed) {
  if (packed.rows > 1u << 16) return;
  const GroupRows groups = read_groups(packed);
  must(groups.start.size() == size_t(packed.rows) + 1 && groups.start[0] == 0, "where rows of groups start");
  must(groups.start.back() == groups.group.size() && groups.value.size() == 4 * groups.group.size(), "how many groups");
  must(groups.scale.size() == packed.rows, "how many scales");
  for (size_t r = 0; r < packed.rows; r++) {
    must(groups.start[r] <= groups.start[r + 1], "order of rows of groups");
    must(groups.scale[r] > 0 && std::isfinite(groups.scale[r]), "scales");
    for (size_t i = groups.start[r]; i < groups.start[r + 1]; i++)
      must(4 * groups.group[i] + 3u < packed.columns && (i == groups.start[r] || groups.group[i - 1] < groups.group[i]),
           "groups");
  }
  if (uint64_t(packed.rows) * packed.columns > 1u << 16) return;
  const Int8Matrix matrix(groups, std::vector<float>(packed.rows, 0.0f), best_int8_kernels());
  must(matrix.rows() == packed.rows && matrix.columns() == packed.columns, "blocks of groups");
}

template <class Work>
bool attempt(Work&& work) {
  try {
    work();
    return true;
  } catch (const PackedError&) {
    return false;
  }
}

// Every reader, on a copy that ends where its memory ends.
void read(const uint8_t* data, size_t size) {
  const std::vector<uint8_t> tight(data, data + size);
  Packed packed{};
  if (!attempt([&] { packed = open(tight.data(), tight.size(), "fuzz"); })) {
    refused++;
    return;
  }
  const bool rows = attempt([&] { check_rows(packed); });
  if (packed.block_bits) must(attempt([&] { check_groups(packed); }) == rows, "both readers agree");
  attempt([&] { read_vector(packed, packed.columns); });
  const bool table = attempt([&] { check_table(packed, packed.columns); });
  rows || table ? accepted++ : refused++;
}

std::vector<Bytes> seeds() {
  Chance chance(11);
  std::vector<Bytes> all;
  const std::pair<uint32_t, uint32_t> shapes[] = {{1, 1}, {1, 17}, {5, 9}, {3, 300}, {200, 4}, {20, 40}};
  for (const Values type : {Values::kFloat32, Values::kFloat16, Values::kInt8})
    for (const auto& [rows, columns] : shapes)
      for (int bits = 0; bits <= 8; bits++)
        for (const double density : {0.0, 0.1, 1.0})
          all.push_back(pack(random_matrix(chance, rows, columns, type, density), bits));
  for (const auto& [rows, columns] : {std::pair<uint32_t, uint32_t>{1, 4}, {5, 12}, {3, 300}})
    for (const double density : {0.0, 1.0}) all.push_back(pack(random_matrix(chance, rows, columns, Values::kInt6, density), 0));
  for (const auto& [rows, columns] : {std::pair<uint32_t, uint32_t>{1, 4}, {5, 12}, {3, 300}, {20, 40}, {2, 1600}})
    for (int bits = 0; bits <= 8; bits++)
      for (const double density : {0.0, 0.1, 1.0})
        all.push_back(pack(random_blocks(chance, rows, columns, density), bits, 4));
  return all;
}

void mutate(Bytes& bytes, Chance& chance) {
  static const uint64_t kEdges[] = {0, 1, 2, 255, 256, 65535, 65536, 1u << 30, 0x7fffffff, 0x80000000u, 0xffffffffu,
                                    uint64_t(1) << 32, uint64_t(1) << 61, ~uint64_t(0), ~uint64_t(0) - 63};
  const size_t size = bytes.size();
  switch (chance.below(7)) {
    case 0:  // a bit anywhere
      if (size) bytes[chance.below(size)] ^= uint8_t(1 << chance.below(8));
      break;
    case 1:  // a byte of the header
      if (size >= 64) bytes[chance.below(64)] = uint8_t(chance.bits());
      break;
    case 2: {  // a count of the header
      const size_t at[] = {8, 12, 16, 24};
      const size_t field = chance.below(4);
      uint64_t value = chance.below(2) ? kEdges[chance.below(15)] : chance.below(600);
      if (size < 64) break;
      uint64_t before = 0;
      std::memcpy(&before, &bytes[at[field]], field < 2 ? 4 : 8);
      if (chance.below(2)) value = before + chance.below(9) - 4;
      std::memcpy(&bytes[at[field]], &value, field < 2 ? 4 : 8);
      break;
    }
    case 3:  // cut
      bytes.resize(chance.below(size + 1));
      break;
    case 4:  // longer
      for (size_t n = chance.below(20); n; n--) bytes.push_back(uint8_t(chance.bits()));
      break;
    case 5:  // a byte of the payload, often all ones
      if (size > 64) bytes[64 + chance.below(size - 64)] = chance.below(2) ? 0xff : uint8_t(chance.bits());
      break;
    default: {  // a value or a count moved from one part of the payload to the other
      if (size < 64) break;
      uint64_t stored, positions;
      std::memcpy(&stored, &bytes[16], 8);
      std::memcpy(&positions, &bytes[24], 8);
      const uint64_t width = bytes[5] == 0 ? 4 : bytes[5] == 1 ? 2 : 1;
      put<uint64_t>(bytes, 16, stored - 1);
      put<uint64_t>(bytes, 24, positions + width);
    }
  }
}

}  // namespace

#if defined(SPARSE_CPU_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  read(data, size);
  Bytes sealed(data, data + size);
  seal(sealed);
  read(sealed.data(), sealed.size());
  return 0;
}
#else
int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::stoull(arguments[1]) : 1;
  const uint64_t iterations = count > 2 ? std::stoull(arguments[2]) : 100000;
  const std::vector<Bytes> all = seeds();
  for (const Bytes& bytes : all) read(bytes.data(), bytes.size());
  must(refused == 0, "a valid matrix was refused");
  Chance chance(seed);
  for (uint64_t i = 0; i < iterations; i++) {
    Bytes bytes = all[chance.below(all.size())];
    for (uint64_t n = 1 + chance.below(3); n; n--) mutate(bytes, chance);
    if (chance.below(8)) seal(bytes);  // mostly forged, so that the checks after the checksum are reached
    read(bytes.data(), bytes.size());
  }
  std::printf("%llu mutations: %zu refused, %zu read\n", static_cast<unsigned long long>(iterations), refused, accepted);
  return 0;
}
#endif
