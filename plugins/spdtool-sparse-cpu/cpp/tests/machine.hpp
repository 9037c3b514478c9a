// A machine of as many cores as a test asks for: it stands in for the standard library's answer, in this program only.
#pragma once

#include <thread>

namespace machine {
inline unsigned cores = 2;
}

unsigned std::thread::hardware_concurrency() noexcept { return machine::cores; }
