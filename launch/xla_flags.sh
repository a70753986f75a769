#!/usr/bin/env bash
# Prints the LIBTPU_INIT_ARGS for every process of a run: bash launch/xla_flags.sh GENERATION [SLICES]
# GENERATION is v4, v5e, v5p, v6e or v7x. libtpu 0.0.52 knows all flags (an unknown flag ends the process at its start), and
# none changes numerical results.
#
# | flag | for | why |
# |---|---|---|
# | xla_enable_async_all_gather, xla_enable_async_collective_permute | v4 | gathers overlap with compute; the default from v5 on |
# | megascale_error_reporter_abort_on_error, ..._on_hang | several slices | a failed slice ends all processes; otherwise the others would wait for it |
# | megascale_graph_hang_threshold=10m (5m), ..._within_launch_... (1m) | several slices | a long wait may not be a hang: a first batch or a checkpoint may block a slice for minutes, and a hang ends the run |
# | xla_tpu_iova_dma_chunk_size_bytes=1 MiB | v6e, several slices | gradients that cross slices otherwise overload the host's PCIe bus; AXLearn's finding |
#
# Not included, for all generations:
# - Options of one train step (VMEM limit, fusions, reduce-scatters): they are in its experiment, as compiler options.
# - Flags of published lists (MaxText, AXLearn) that are the default in libtpu 0.0.52: sharded matmuls, in a loop and in
#   a scan, over one slice and two, compiled to the same program with and without
#   xla_tpu_enable_data_parallel_all_reduce_opt,
#   xla_tpu_data_parallel_opt_different_sized_ops (gradients cross slices during the backward pass of the next layer),
#   xla_tpu_enable_latency_hiding_scheduler, xla_tpu_overlap_compute_collective_tc, and on v5e
#   xla_tpu_enable_async_collective_fusion, ..._multiple_steps, ..._fuse_all_gather and xla_enable_async_all_gather.
# - ..._fuse_all_gather with xla_enable_async_all_gather on v5p and v6e: libtpu 0.0.52 refuses the pair on all but v5e
#   ("might lead to incorrect results, hang").
# - xla_tpu_enable_sunk_dcn_allreduce_done_with_host_reduction (AXLearn): the same programs, or a failed compile.
# - megascale_grpc_premap_memory_bytes (AXLearn: 16 GiB instead of 4): for hosts that send more between slices. Here
#   hosts send their share of the gradients, 0.2 GB a host for the 3B model in float32 on slices of 256 chips.
# - xla_tpu_use_enhanced_launch_barrier: JAX sets it itself.
set -euo pipefail
generation=${1:-} slices=${2:-1}
flags=()
case "$generation" in
v4) flags+=(--xla_enable_async_all_gather=true --xla_enable_async_collective_permute=true) ;;
v5e | v5p | v6e | v7x) ;;
*)
  echo "error: unknown TPU generation: '$generation'. Give v4, v5e, v5p, v6e or v7x." >&2
  exit 2
  ;;
esac
if [ "$slices" -gt 1 ]; then
  flags+=(--megascale_error_reporter_abort_on_error=true --megascale_error_reporter_abort_on_hang=true)
  flags+=(--megascale_graph_hang_threshold=10m --megascale_graph_within_launch_hang_threshold=10m)
  if [ "$generation" = v6e ]; then
    flags+=(--xla_tpu_iova_dma_chunk_size_bytes=1048576)
  fi
fi
echo "${flags[*]-}"
