#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "gate.h"

int main(int argc, char **argv)
{
	struct hydro_gate_page gate;
	struct hydro_bundle_page bundle;
	FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;

	if (file == NULL || fread(&gate, sizeof gate, 1, file) != 1 || fclose(file) != 0)
		return 1;
	file = fopen(argv[2], "rb");
	if (file == NULL || fread(&bundle, sizeof bundle, 1, file) != 1 || fclose(file) != 0)
		return 1;
	if (memcmp(gate.magic, HYDRO_GATE_MAGIC, 8) != 0 || memcmp(bundle.magic, HYDRO_BUNDLE_MAGIC, 8) != 0)
		return 1;
	printf("%" PRIu32 " %" PRIu32 " %" PRId64 " %" PRId64 " %" PRId64 " %" PRIu64 " %" PRId64 " %" PRId32 " %" PRId32
	       " %" PRId32 " %" PRIu64 "\n",
	       gate.word, gate.record.lease_word, gate.heartbeat_ns, gate.record.opened_at_ns, gate.record.deadline_ns,
	       gate.record.free_bytes, gate.record.iteration, gate.record.stage, gate.record.num_stages, gate.record.pid,
	       gate.record.start_ticks);
	printf("%d %" PRIu32 " %" PRId64 " %" PRIu64 " %d %d\n", bundle.state == HYDRO_BUNDLE_PAUSED,
	       bundle.record.num_lanes, bundle.record.quantum_p99_ns, bundle.record.compute_ns,
	       (gate.word & HYDRO_STATE_MASK) == HYDRO_OPEN, bundle.acknowledged_word == gate.word);
	return 0;
}
