"""Every key of a run, with the paper's values: AIMv2-L at 224 px. Other experiments change a few of these.

Tags: [P] the paper (arXiv 2411.14402; A1: its Table A1), [R] Apple's public trainer, [O] ours, with the reason.
"""

import ml_collections
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # All randomness is a function of (seed, purpose, example number). [O]
    config.model = _model()
    config.loss = _loss()
    config.optimizer = _optimizer()
    config.data = _data()
    config.tokenizer = ConfigDict(
        dict(
            path="",  # A SentencePiece .model file; the recipe's has 32,000 pieces. [R]
        )
    )
    config.eval = _eval()
    config.init = ConfigDict(
        dict(
            # Whose parameters start this run: another run (WORKDIR, WORKDIR:STEP, WORKDIR:last), a folder of Hugging
            # Face's, or a .safetensors file; "": nobody's. [O]
            path="",
            parts="model",  # Of its parameters: the "encoder", or the whole "model". [O]
            drop=(),  # Tensors there that this model lacks, as "encoder/position": nothing is left over unsaid. [O]
            fresh=(),  # Tensors here that start as initialised. [O]
        )
    )
    config.mesh = ConfigDict(
        dict(
            slices=1,  # Slices of a pod job: parameters are whole in each, gradients are summed over them last. [O]
            data=-1,  # Devices of a slice that split the batch and hold whole parameters; -1: all that are left. [O]
            fsdp=1,  # Devices of a slice that split the batch and the parameters. [O]
            tensor=1,  # Devices of a slice that split heads, hidden units and vocabulary. [O]
        )
    )
    config.processes = ConfigDict(
        dict(
            startup_timeout_s=300,  # For all to come; then those that are missing are named, and none starts. [O]
            heartbeat_timeout_s=100,  # From a process' death to the end of all others, which name it. [O: as jax's]
            barrier_timeout_s=300,  # That they wait for one another: for what process 0 decides, and at the end. [O]
        )
    )
    config.train = _train()
    config.guard = ConfigDict(
        dict(
            # Steps in a row whose loss or gradient isn't finite; each changes no parameter, the last stops the run. [O]
            max_nonfinite=3,
            # What is done where the loss or the gradient's norm is beyond spike_sigma deviations of the last 128 steps:
            # "off"; "log" it; "skip" the update; or "rewind": go back to a checkpoint, and jump over the batches. [O]
            spike="log",
            spike_sigma=6.0,  # [O: OLMo's]
            rewind_batches=200,  # Batches up to the spike that a rewind jumps over, as far as it goes back. [O: PaLM's]
            max_rewinds=20,  # Of a run; then it stops. [O: PaLM's number of spikes]
            # Every so many steps the same step is computed twice and compared bit by bit; 0: never. Costs one step, and
            # the memory of a second state while it lasts. [O]
            recompute_every=0,
            recompute_elsewhere=True,  # The second time on the devices in another order, where there are several. [O]
        )
    )
    # Seconds after which the run counts as hung, and ends with all stacks in its log; 0: never.
    config.watch = ConfigDict(
        dict(
            start_s=1800,  # From joining the others to the first batch, compilation aside. [O]
            data_s=600,  # For the next batch. [O]
            step_s=600,  # For a step's numbers. [O]
            evaluation_s=7200,  # For a whole evaluation. [O]
            save_s=1800,  # For a checkpoint to be written. [O]
            stop_s=1800,  # For the last save of a run that was asked to stop, one that was on its way included. [O]
        )
    )
    return config


def _model() -> ConfigDict:
    return ConfigDict(
        dict(
            patch_size=14,  # Side of a patch, pixels. [P: A1]
            encoder=dict(
                width=1024,  # Channels of the residual stream. [P]
                depth=24,  # Blocks. [P]
                heads=8,  # Attention heads, 128 channels each. [P]
                hidden=ml_collections.config_dict.placeholder(
                    int
                ),  # SwiGLU units; None: the rule, 2/3 of 4 x width up to 256s. [R]
                position="learned",  # "learned" table for one resolution, or "sincos" of the true grid. [P]
                attention_mask="prefix",  # In training: a random "prefix", or "full", without the image loss. [P]
            ),
            decoder=dict(
                width=1024,  # [P]
                depth=12,  # [P]
                heads=8,  # [R]
                hidden=ml_collections.config_dict.placeholder(int),  # As the encoder's. [R]
                vocab_size=32000,  # Rows of the token table; at least the tokenizer's pieces. [R]
                text_length=77,  # Tokens of a caption [P: A1], its end included where it fits [R; O: RECIPE.md §4].
                remat=ml_collections.config_dict.placeholder(str),  # The decoder's own; None: as model.remat. [O]
                # "joint": one trunk for both losses; "separate": a whole decoder for each; "mlp": AIMv1's head, which
                # predicts patches only, by blocks without attention. [P]
                kind="joint",
                # Share of the encoder's rows that the decoder is given in training, drawn by example; below 1 without
                # the image loss only. [O: OpenVision 2 keeps 0.35 to save time, AIMv2 keeps all]
                keep_rows=1.0,
            ),
            norm_eps=1e-5,  # RMSNorm. [R]
            pixel_mean=(0.485, 0.456, 0.406),  # ImageNet's, of pixels in [0, 1]. [R]
            pixel_std=(0.229, 0.224, 0.225),  # [R]
            layers="loop",  # Blocks by "scan" (quick to compile) or "loop" (faster on TPU); one parameter tree. [O]
            # What the backward pass recomputes: "none", "matmuls" (all but matrix products), "gate" (also up),
            # "attention" (also gate), or "full" blocks; each needs less memory than the one before. [O]
            remat="none",
            attention="auto",  # "xla", "pallas" (our kernels), or "auto": kernels on TPU with 128 channels a head. [O]
            compute_dtype="bfloat16",  # Activations and matrix products; norms, softmax, losses are float32. [R]
            param_dtype="float32",  # Parameters and Adam's moments. [R]
        )
    )


def _loss() -> ConfigDict:
    return ConfigDict(
        dict(
            image=True,  # Next-patch regression. [P]
            text=True,  # Next-token cross-entropy. [P]
            alpha=0.4,  # Weight of the image loss; total = text + alpha x image. [P]
            predict_eos=True,  # The end of a caption is a target. [O: a decoder that cannot stop cannot caption]
            target_eps=1e-6,  # Added to a patch's variance before the root. [R]
        )
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        dict(
            peak_lr=1e-3,  # Of large and base; pretrain.py has the others. [P: A1]
            start_lr=1e-6,  # The first step's. [R]
            end_lr=1e-5,  # From step `schedule_steps` on. [P: A1]
            warmup_steps=12_500,  # Linear, start_lr to peak_lr. [P: A1]
            schedule_steps=1_500_000,  # Warm-up and cosine together; at 8192 a step 12.29e9 samples. [P: A1]
            betas=(0.9, 0.95),  # [P: A1]
            eps=1e-8,  # [R]
            weight_decay=1e-4,  # Fraction taken off a step at the peak lr, scaled by lr / peak_lr. [P: A1; R: the form]
            clip_norm=1.0,  # Of the global gradient norm. [P: A1]
            # Of the parameters' exponential average, which then is what is loaded after training; 0: none is kept. [O:
            # a third more memory and disk for the state; neither the paper nor the public trainer has one]
            ema_decay=0.0,
            schedule="cosine",  # [P: A1]; "half_cosine" ends half way to end_lr, and cooldowns branch off it [P: §3.1].
            # Steps of a cooldown (train.cooldown_from), as a share of all steps up to its end. [P: §3.1; O: of all,
            # since 0.8 of the paper's 6.4 billion samples are its "5 billion", and 1 / 1.2 of them are not]
            cooldown_share=0.2,
            cooldown_lr=1e-6,  # Where a cooldown ends, linearly. [P: §3.1]
        )
    )


def _data() -> ConfigDict:
    return ConfigDict(
        dict(
            batch_size=8192,  # Examples a step, over all devices and hosts (see also areas). [P: A1]
            workers=8,  # Processes that read and decode, on each host; 0: threads of the trainer. [O]
            read_threads=32,  # Records that each worker reads at a time, ahead of decoding. [O: 50 ms a read is 640/s]
            prefetch=2,  # Batches that each worker keeps ready. [O]
            image_size=224,  # Side of the training crop, pixels. [P: A1]
            crop_area=(0.4, 1.0),  # RandomResizedCrop: share of the picture's area. [P: A1]
            crop_ratio=(3 / 4, 4 / 3),  # RandomResizedCrop: aspect ratio, width / height. [P: A1; R: 4 / 3 for 1.33]
            flip=0.5,  # Probability of a horizontal flip. [P: A1]
            sources={},  # Name -> folder of prepared records; "package:..." is inside the package. [P]
            mixture={},  # Source name -> caption kind -> weight; exact over one cycle of the weights. [P: Table 2]
            max_bad_fraction=0.01,  # Records that may be unusable before the run stops. [O]
            # Native resolution: areas, in patches, of which every step draws one (RECIPE.md §9), and to which pictures
            # are resized whole, with their aspect. Batches have batch_size examples at the largest area, and at others
            # as many more as fit in as many patches. Empty: a fixed resolution, crops of image_size. [P]
            areas=(),
            upscale=True,  # At native resolution, whether smaller pictures are enlarged to the area. [O: utilisation]
        )
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        dict(
            sources={},  # Held-out sets, name -> folder; empty: no evaluation. [O]
            kinds=("alt", "synthetic"),  # Caption kinds that are evaluated. [O]
            batch_size=1024,  # Examples at a time. [O]
            prefixes=(0.25, 0.5, 0.75),  # Fixed prefix lengths, as shares of a picture's patches. [O]
            max_examples=ml_collections.config_dict.placeholder(int),  # Pictures of each source; None: all. [O]
            # None: centre squares of data.image_size; or whole pictures with their aspect in so many patches. [O]
            area=ml_collections.config_dict.placeholder(int),
        )
    )


def _train() -> ConfigDict:
    return ConfigDict(
        dict(
            steps=1_500_000,  # Where the run ends; the learning rate follows optimizer.schedule_steps. [P: A1]
            log_every=100,  # Steps between lines of metrics.jsonl. [O]
            eval_every=10_000,  # Steps between evaluations; 0: at the end only. [O]
            eval_at_start=False,  # Also before the first step: what a start from another run (init) is worth. [O]
            save_every=5_000,  # Steps between checkpoints; 0: at the end only. [O]
            keep=3,  # Newest checkpoints kept, beside the best. [O]
            microbatches=1,  # Parts of a batch computed one after another; changes no number but rounding. [O]
            reduce_dtype="float32",  # Of gradients on their way between devices, or "bfloat16". [O; R: bfloat16]
            tpu_compiler_options=dict(  # Of libtpu, for the train step, by generation; why: experiments/LOG.md. [O]
                all=dict(xla_tpu_scoped_vmem_limit_kib="65536"),
                v5e=dict(
                    xla_tpu_decompose_every_reduce_scatters_hlos="true",
                    xla_tpu_ars_combiner_threshold_in_bytes="0",
                    xla_enable_async_reduce_scatter_fusion="true",
                    xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter="true",
                ),
            ),
            # JAX's persistent cache, by which a run that starts again compiles nothing: a folder, or "workdir" for
            # WORKDIR/compiled on accelerators (not on CPUs: code for one need not run on the next); None: off. [O]
            compilation_cache="workdir",
            tensorboard=True,  # Also write TensorBoard events to WORKDIR/tensorboard. [O]
            wandb_project=ml_collections.config_dict.placeholder(
                str
            ),  # Also log to Weights & Biases (extra "wandb"). [O]
            profile=ml_collections.config_dict.placeholder(
                tuple
            ),  # (first, end): XProf's trace of steps first to end - 1 goes to WORKDIR/profile; None: off. [O]
            keep_steps=(),  # Steps that are saved and, as the newest and the best, kept: for cooldowns to start at. [O]
            # "WORKDIR:STEP": this run branches off that one after that step and cools down; it goes on with the whole
            # state and the same examples, and `steps` is then where the cooldown ends. None: no branch. [P; O: the way]
            cooldown_from=ml_collections.config_dict.placeholder(str),
        )
    )
