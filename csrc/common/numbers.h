#pragma once

namespace kr {

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace kr
