// Ordering bugs that tests plant on purpose: each bit makes one contract of sync/exchange.cuh break, in the way in which
// hardware or a careless change could break it. Tests that do not notice a planted bug would not notice a real one.
// Free of CUDA headers.
#pragma once

#include <cstdint>

namespace deep_ep {

// A contract's number is also its bit.
enum class Contract : uint32_t {
    kFieldsBeforeFlag = 0,   // an announcement's flag comes after its fields
    kAnnouncedInTime = 1,    // an announcement is for its own operation, not yet for the next one
    kAwaitAnnouncement = 2,  // no row moves before the peer's announcement of this operation is here
    kMarkAfterStores = 3,    // a done mark comes after the stores of all blocks
    kAwaitMarks = 4,         // an operation ends after the done marks of all peers
    kPlacesBeforeFlag = 5,   // rows are told to go when their places have been written
    kAwaitPlaces = 6,        // and go when they are told
};

struct PlantedBug {
    const char* name;
    Contract broken;
};

constexpr PlantedBug kPlantedBugs[] = {
    {"flag before fields", Contract::kFieldsBeforeFlag},
    {"announced one operation early", Contract::kAnnouncedInTime},
    {"announcement not awaited", Contract::kAwaitAnnouncement},
    {"mark before stores", Contract::kMarkAfterStores},
    {"marks not awaited", Contract::kAwaitMarks},
    {"flag before places", Contract::kPlacesBeforeFlag},
    {"places not awaited", Contract::kAwaitPlaces},
};

}  // namespace deep_ep
