#pragma once
#include "common/membership/membership_signals.h"

namespace kr {

void membership_signals(const MembershipSignals& call, int threads);

}  // namespace kr
