// What racecheck follows of a note in shared memory that one warp writes and a warpgroup reads.
//
//     nvcc -arch=sm_90a -o racecheck racecheck.cu
//     for case in 0 1 2 3 4 5 6 7 8; do compute-sanitizer --tool racecheck ./racecheck $case; done
//
// Reports on an H100 (compute-sanitizer of CUDA 13, driver 580.159.04, 2026-11-27):
//
//     RACE                 4  nothing puts the write before the reads: a race
//     ONE_LANE             0  the lane that writes arrives at the mbarrier
//     ALL_LANES            4  32 lanes write the same, one arrives: ordered by lock-step only
//     ALL_LANES_SYNCWARP   4  the same with __syncwarp between: ordered, and reported
//     ONE_LANE_TMA         0  the lane that writes expects bytes, which a bulk copy brings
//     AGAIN_ALL_ARRIVE     0  written again after an mbarrier at which every reader arrived
//     AGAIN_ONE_ARRIVES    4  at which one arrived after a bar.sync of all: ordered, and reported
//     NAMED, PLAIN         0  barrier.sync with and without a number of threads
//
// So racecheck does not follow an order that goes through two barriers of different kinds. Triton's
// mbarrier.arrive is the last but one: bar.sync of a warpgroup, then one thread arrives.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
enum { RACE, ONE_LANE, ALL_LANES, ALL_LANES_SYNCWARP, ONE_LANE_TMA, AGAIN_ALL_ARRIVE, AGAIN_ONE_ARRIVES, NAMED, PLAIN };
__device__ uint32_t sm(void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void init(uint64_t* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sm(b)), "r"(n)); }
__device__ void arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sm(b)) : "memory"); }
__device__ void wait(uint64_t* b, int phase) {
  asm volatile("{ .reg .pred p;\nL_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra.uni L_%=;\n}" ::"r"(sm(b)), "r"(phase) : "memory");
}
__device__ void load(void* dst, const void* src, uint64_t* b) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(sm(b)) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(sm(dst)), "l"(src), "r"(sm(b)) : "memory");
}
template <int MODE>
__global__ void k(const int* src, int* out) {
  __shared__ alignas(16) volatile int note;
  __shared__ alignas(128) int data[64];
  __shared__ alignas(8) uint64_t ready, freed;
  const bool again = MODE == AGAIN_ALL_ARRIVE || MODE == AGAIN_ONE_ARRIVES;
  int t = threadIdx.x;
  if (t == 0) { init(&ready, 1); init(&freed, MODE == AGAIN_ALL_ARRIVE ? 128 : 1); }
  __syncthreads();
  if (t >= 128) {  // the producer warp
    if (MODE == ALL_LANES || MODE == ALL_LANES_SYNCWARP || t == 128) note = 7;
    if (MODE == ALL_LANES_SYNCWARP) __syncwarp();
    if (MODE == NAMED) asm volatile("barrier.sync 1, 160;" ::: "memory");
    else if (MODE == PLAIN) asm volatile("barrier.sync 1;" ::: "memory");
    else if (t == 128) { if (MODE == ONE_LANE_TMA) load(data, src, &ready); else if (MODE != RACE) arrive(&ready); }
    if (again) { wait(&freed, 0); if (t == 128) note = 8; }
  } else {  // a warpgroup
    if (MODE == NAMED) asm volatile("barrier.sync 1, 160;" ::: "memory");
    else if (MODE == PLAIN) asm volatile("barrier.sync 1;" ::: "memory");
    else if (MODE != RACE) wait(&ready, 0);
    out[t] = note + (MODE == ONE_LANE_TMA ? data[t % 64] : 0);
    if (MODE == AGAIN_ONE_ARRIVES) asm volatile("bar.sync 2, 128;" ::: "memory");
    if (again && (MODE == AGAIN_ALL_ARRIVE || t == 0)) arrive(&freed);
  }
}
int main(int argc, char** argv) {
  int *src, *out;
  cudaMalloc(&src, 256); cudaMalloc(&out, 512); cudaMemset(src, 0, 256);
#define CASE(M) case M: printf("%s: ", #M); k<M><<<1, 160>>>(src, out); break;
  switch (atoi(argv[1])) {
    CASE(RACE) CASE(ONE_LANE) CASE(ALL_LANES) CASE(ALL_LANES_SYNCWARP) CASE(ONE_LANE_TMA)
    CASE(AGAIN_ALL_ARRIVE) CASE(AGAIN_ONE_ARRIVES) CASE(NAMED) CASE(PLAIN)
  }
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
