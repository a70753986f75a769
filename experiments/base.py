"""Base config with every key of a run, at the paper's values: AIMv2-L at 224 px. Other experiments override a few keys.

Tags: [P] the paper (arXiv 2411.14402; A1: its Table A1), [R] Apple's public trainer, [O] ours, with the reason.
"""

import ml_collections
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # "pretrain": AIMv2; "lit": a text tower is aligned with a frozen encoder, whose weights come from `init` [P];
    # "distill": AIMv2 that also learns from a frozen teacher [O: the recipe; Apple distilled L from 3B].
    config.task = "pretrain"
    config.seed = 0  # All randomness is a function of (seed, purpose, example number). [O]
    config.model = _model()
    config.loss = _loss()
    config.lit = _lit()
    config.distill = _distill()
    config.optimizer = _optimizer()
    config.data = _data()
    config.tokenizer = ConfigDict(
        dict(
            path="",  # A SentencePiece .model file (the recipe's has 32,000 pieces [R]) or a tokenizer.json.
        )
    )
    config.eval = _eval()
    config.init = ConfigDict(
        dict(
            # Source of initial weights: another run (WORKDIR, WORKDIR:STEP, WORKDIR:last), a Hugging Face folder, or a
            # .safetensors file; "": none. [O]
            path="",
            parts="model",  # Parameters to load: the "encoder" or the whole "model". [O]
            ignore=(),  # Source tensors that this model may lack, such as "encoder/position"; others are an error. [O]
            reinit=(),  # Tensors of this model that keep their random initialisation. [O]
        )
    )
    config.mesh = ConfigDict(
        dict(
            slices=1,  # Slices of a pod job: each holds all parameters, and gradients are summed over slices last. [O]
            data=-1,  # Devices of a slice that split the batch and replicate parameters; -1: all remaining devices. [O]
            # Devices of a slice that split the batch and the parameters; -1 beside data=-1: those with fast links, the
            # GPUs of a node, or all of a slice of TPUs. [O]
            fsdp=1,
            tensor=1,  # Devices of a slice that split heads, hidden units and vocabulary. [O]
        )
    )
    config.processes = ConfigDict(
        dict(
            startup_timeout_s=300,  # Rendezvous timeout; the error names the missing processes, and none starts. [O]
            heartbeat_timeout_s=100,  # When a process dies, the others name it and exit within this time. [O: as jax's]
            barrier_timeout_s=300,  # Timeout of barriers: for decisions of process 0, and at shutdown. [O]
        )
    )
    config.train = _train()
    config.guard = ConfigDict(
        dict(
            # Consecutive steps with non-finite loss or gradient that stop the run; each skips the update. [O]
            max_nonfinite=3,
            # Action if the loss or the gradient norm exceeds spike_sigma standard deviations of the last 128 steps:
            # "off"; "log"; "skip" the update; or "rewind" to a checkpoint and skip the batches. [O]
            spike="log",
            spike_sigma=6.0,  # [O: OLMo's]
            rewind_batches=200,  # Batches up to the spike that a rewind skips, within the steps it repeats. [O: PaLM's]
            max_rewinds=20,  # Rewinds after which the run stops. [O: PaLM's number of spikes]
            # Steps between checks for silent data corruption, which compute a step twice and compare it bit by bit; 0:
            # never. A check costs one step, and temporarily the memory of a second state. [O]
            sdc_check_every=0,
            # Whether the second step runs on rotated devices, if there are several; not on GPUs (sdc_check.py). [O]
            sdc_rotate_devices=True,
        )
    )
    # Watchdog timeouts in seconds: a hung run writes all stacks to its log and exits; 0: never.
    config.watch = ConfigDict(
        dict(
            start_s=1800,  # From the rendezvous to the first batch, without compilation. [O]
            data_s=600,  # For the next batch. [O]
            step_s=600,  # For a step's metrics. [O]
            evaluation_s=7200,  # For a whole evaluation. [O]
            save_s=1800,  # For a checkpoint to be written. [O]
            stop_s=1800,  # For the last save after preemption, including a save in progress. [O]
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
                # SwiGLU units; None: 2/3 of 4 x width, rounded up to a multiple of 256. [R]
                hidden=ml_collections.config_dict.placeholder(int),
                position="learned",  # "learned" table for one resolution, or "sincos" of the actual grid. [P]
                attention_mask="prefix",  # In training: a random "prefix"; or "full", only without the image loss. [P]
            ),
            decoder=dict(
                width=1024,  # [P]
                depth=12,  # [P]
                heads=8,  # [R]
                hidden=ml_collections.config_dict.placeholder(int),  # Like the encoder's. [R]
                vocab_size=32000,  # Rows of the token table; at least the tokenizer's vocabulary. [R]
                text_length=77,  # Tokens of a caption [P: A1], with its end token if it fits [R; O: RECIPE.md §4].
                remat=ml_collections.config_dict.placeholder(str),  # The decoder's remat; None: model.remat. [O]
                # "joint": one trunk for both losses; "separate": one decoder for each loss; "mlp": AIMv1's head, which
                # predicts only patches, with blocks without attention. [P]
                kind="joint",
                # Fraction of the encoder's tokens that the decoder gets in training, sampled for each example; below 1
                # only without the image loss. [O: OpenVision 2 keeps 0.35 to save time, AIMv2 keeps all]
                token_keep_rate=1.0,
            ),
            norm_eps=1e-5,  # RMSNorm. [R]
            pixel_mean=(0.485, 0.456, 0.406),  # ImageNet's, for pixels in [0, 1]. [R]
            pixel_std=(0.229, 0.224, 0.225),  # [R]
            layers="loop",  # "scan" over blocks (fast compilation) or "loop" (faster on TPU); same parameter tree. [O]
            # Recomputation in the backward pass: "none", "matmuls" (all but matrix products), "gate" (also up),
            # "attention" (also gate), or "full" blocks; each needs less memory than the previous one. [O]
            remat="none",
            # "xla"; "pallas" (our kernels for TPU, 128 channels a head); "cudnn" (flash attention on NVIDIA GPUs, in
            # bfloat16); or "auto": the platform's kernels where they take the heads and the dtype, else "xla". [O]
            attention="auto",
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
            predict_eos=True,  # Whether the end token is a target. [O: a decoder that cannot stop cannot caption]
            target_eps=1e-6,  # Added to a patch's variance before the square root. [R]
        )
    )


def _lit() -> ConfigDict:
    """Keys of task "lit". The text tower is as released; of its training the paper gives only the number of pairs."""
    return ConfigDict(
        dict(
            text=dict(
                width=768,  # [R]
                depth=12,  # [R]
                heads=6,  # [R]
                hidden=ml_collections.config_dict.placeholder(int),  # Like the encoder's. [R]
                vocab_size=49_408,  # Rows of the token table: CLIP's vocabulary. [R]
                text_length=77,  # Tokens of a caption, always with its end token. [R]
            ),
            embed_dim=768,  # Channels of the common space. [R]
            # "softmax": cross-entropy of each image over the captions of the batch and the reverse, as CLIP; "sigmoid":
            # each pair by itself, as SigLIP. [O]
            loss="softmax",
            chunks=1,  # Parts of a device's rows that are compared with the batch in turn, to save memory. [O]
            # Parts of the model that are trained; the encoder never is. [P]
            trainable=("head", "image_projection", "text", "text_projection", "logit_scale", "logit_bias"),
        )
    )


def _distill() -> ConfigDict:
    """Keys of task "distill". Apple says only that the large model was distilled from 3B, so all of them are ours."""
    return ConfigDict(
        dict(
            # The teacher: a run or an export (WORKDIR, WORKDIR:STEP, WORKDIR:last), a Hugging Face folder, or a
            # .safetensors file. It is read before the first step only, and saved with every checkpoint. [O]
            path="",
            # The teacher's sizes, which must be those of the file: programs are compiled and predicted without it. [O]
            encoder=dict(
                width=3072,  # [P: 3B]
                depth=24,  # [P]
                heads=24,  # [P]
                hidden=ml_collections.config_dict.placeholder(int),  # Like the student's. [R]
                position="learned",  # "learned" for one resolution, its own, or "sincos". [P]
            ),
            # The teacher's decoder; None: it has none, or none is needed. Text as in model.decoder. [O]
            decoder=dict(
                width=1024,  # [P]
                depth=12,  # [P]
                heads=8,  # [R]
                hidden=ml_collections.config_dict.placeholder(int),  # Like the student's. [R]
                kind="joint",  # As in model.decoder. [P]
            ),
            # Side of the teacher's training crop, pixels: the same crop as the student's, resized. None: the student's
            # own patches. [O]
            image_size=ml_collections.config_dict.placeholder(int),
            # Weights of the losses against the teacher, 0 to leave one out: patch features after the final norm
            # through a linear map, text logits, and predicted patches. [O]
            features=1.0,
            logits=1.0,
            pixels=0.0,
            own=1.0,  # Factor of the student's own losses, which `loss` configures; 0: none. [O]
            feature_loss="cosine",  # "cosine": 1 - cosine of the angle, or "l2": mean squared difference. [O]
            temperature=1.0,  # Divides logits before the softmax; the loss is multiplied by its square. [O: Hinton's]
        )
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        dict(
            peak_lr=1e-3,  # For large and base; pretrain.py has the others. [P: A1]
            start_lr=1e-6,  # At the first step. [R]
            end_lr=1e-5,  # From step `schedule_steps` on. [P: A1]
            warmup_steps=12_500,  # Linear, start_lr to peak_lr. [P: A1]
            schedule_steps=1_500_000,  # Warm-up plus cosine; 12.29e9 samples at 8192 a step. [P: A1]
            betas=(0.9, 0.95),  # [P: A1]
            eps=1e-8,  # [R]
            weight_decay=1e-4,  # Decay per step at the peak lr, scaled by lr / peak_lr. [P: A1; R: the form]
            clip_norm=1.0,  # Maximum global gradient norm. [P: A1]
            # Decay of the parameters' moving average, which replaces the parameters after training; 0: no average. [O:
            # the state takes a third more memory and disk; neither the paper nor the public trainer has one]
            ema_decay=0.0,
            schedule="cosine",  # [P: A1]; "half_cosine" ends halfway to end_lr, and cooldowns branch off it [P: §3.1].
            # Steps of a cooldown (train.cooldown_from), as a fraction of all steps up to its end. [P: §3.1; O: of all,
            # since 0.8 of the paper's 6.4 billion samples are its "5 billion", and 1 / 1.2 of them are not]
            cooldown_share=0.2,
            cooldown_lr=1e-6,  # Final rate of a linear cooldown. [P: §3.1]
        )
    )


def _data() -> ConfigDict:
    return ConfigDict(
        dict(
            batch_size=8192,  # Examples a step, over all devices and hosts (see also areas). [P: A1]
            workers=8,  # Processes on each host that read and decode; 0: threads of the trainer. [O]
            read_threads=32,  # Concurrent record reads of each worker, ahead of decoding. [O: 50 ms a read is 640/s]
            prefetch=2,  # Batches that each worker keeps ready. [O]
            # A host's folder for the indices of datasets in a bucket; None: one in the system's temporary folder. [O]
            cache_dir=ml_collections.config_dict.placeholder(str),
            cache_gb=0.0,  # Records of each dataset in a bucket that are kept in cache_dir, in GB; 0: none. [O]
            image_size=224,  # Side of the training crop, pixels. [P: A1]
            crop_area=(0.4, 1.0),  # RandomResizedCrop: fraction of the image's area. [P: A1]
            crop_ratio=(3 / 4, 4 / 3),  # RandomResizedCrop: aspect ratio, width / height. [P: A1; R: 4 / 3 for 1.33]
            flip=0.5,  # Probability of a horizontal flip. [P: A1]
            # Name -> folder of prepared records, also gs://BUCKET/SET or s3://BUCKET/SET; "package:..." is inside the
            # package. [P]
            sources={},
            mixture={},  # Source name -> caption type -> weight; exact over one cycle of the weights. [P: Table 2]
            max_bad_fraction=0.01,  # Fraction of unusable records above which the run stops. [O]
            # Native resolution: areas in patches. Each step draws one (RECIPE.md §9) and resizes images whole to it, at
            # their aspect ratio. A batch has batch_size examples at the largest area, and more at smaller ones, as many
            # as fit in the same number of patches. Empty: a fixed resolution with crops of image_size. [P]
            areas=(),
            upscale=True,  # At native resolution, whether to enlarge smaller images to the area. [O: utilisation]
        )
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        dict(
            sources={},  # Held-out datasets, name -> folder or URL as in data.sources; empty: no evaluation. [O]
            caption_types=("alt", "synthetic"),  # Caption types that are evaluated. [O]
            batch_size=1024,  # Examples at a time. [O]
            prefixes=(0.25, 0.5, 0.75),  # Fixed prefix lengths, as fractions of an image's patches. [O]
            max_examples=ml_collections.config_dict.placeholder(int),  # Images of each source; None: all. [O]
            # None: centre crops of data.image_size; a number: whole images with their aspect in that many patches. [O]
            area=ml_collections.config_dict.placeholder(int),
        )
    )


def _train() -> ConfigDict:
    return ConfigDict(
        dict(
            steps=1_500_000,  # Last step; the learning rate follows optimizer.schedule_steps. [P: A1]
            log_every=100,  # Steps between lines in metrics.jsonl. [O]
            eval_every=10_000,  # Steps between evaluations; 0: only at the end. [O]
            eval_at_start=False,  # Whether to evaluate the initial weights before the first step. [O]
            save_every=5_000,  # Steps between checkpoints; 0: only at the end. [O]
            keep=3,  # Newest checkpoints kept, in addition to the best one. [O]
            microbatches=1,  # Sequential parts of a batch; results differ only by rounding. [O]
            reduce_dtype="float32",  # Dtype of gradient reductions between devices, or "bfloat16". [O; R: bfloat16]
            # libtpu options for the train step, by TPU generation; reasons: experiments/LOG.md. [O]
            tpu_compiler_options=dict(
                all=dict(xla_tpu_scoped_vmem_limit_kib="65536"),
                v5e=dict(
                    xla_tpu_decompose_every_reduce_scatters_hlos="true",
                    xla_tpu_ars_combiner_threshold_in_bytes="0",
                    xla_enable_async_reduce_scatter_fusion="true",
                    xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter="true",
                ),
            ),
            # XLA options for the train step on NVIDIA GPUs; reasons: experiments/LOG.md. [O]
            gpu_compiler_options=dict(
                xla_gpu_exclude_nondeterministic_ops="true",
                xla_gpu_deterministic_ops="false",
                xla_gpu_enable_latency_hiding_scheduler="true",
            ),
            # JAX's persistent compilation cache, so that restarts skip compilation: a folder, or "workdir" for
            # WORKDIR/compiled on accelerators (not on CPUs, whose code may not run on another CPU); None: off. [O]
            compilation_cache="workdir",
            tensorboard=True,  # Also write TensorBoard events to WORKDIR/tensorboard. [O]
            # Project for logging to Weights & Biases (extra "wandb"); None: off. [O]
            wandb_project=ml_collections.config_dict.placeholder(str),
            # (first, end): XProf traces steps first to end - 1 to WORKDIR/profile; None: off. [O]
            profile=ml_collections.config_dict.placeholder(tuple),
            keep_steps=(),  # Steps that are saved and never deleted, as starting points of cooldowns. [O]
            # "WORKDIR:STEP": this run is a cooldown that branches off that run after that step. It continues with the
            # whole state and the same examples; `steps` is the end of the cooldown. None: no branch. [P; O: the way]
            cooldown_from=ml_collections.config_dict.placeholder(str),
        )
    )
