"""Mutants of the core, at least forty: one-line faults, and the tests that must notice each.

tests/test_mutants.py applies each to a copy of the tree and expects the listed tests to fail
(`make test-slow`). When code moves, re-point `file`, `old`, `new` and `tests`; keep the fault.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str  # what is wrong in the mutated code
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # pytest node ids, the cheapest that must fail


INVARIANCE = "tests/test_invariance.py::test_any_plan_gives_the_papers_loss_and_gradients"
RANKS = "tests/test_ranks.py::test_ranks_together_give_the_loss_and_gradients_of_one_alone"
CUDA = "tests/test_cuda_without_a_gpu.py"
STEP = f"{CUDA}::test_a_training_step_waits_once_and_exchanges_each_block_once"
SFT_STEP, DPO_STEP = (f"{STEP}[train-step objective={o} world_size=8]" for o in ("sft", "dpo"))
GENERATE = f"{CUDA}::test_a_captured_decode_step_never_waits_for_the_device[generate]"
COMPILE = (
    f"{CUDA}::test_kernels_fit_the_gpu_spill_nothing_and_load_16_bytes_at_a_time"
    "[compile capability=90]"
)

MUTANTS = (
    # ---------------------------------------------------------------- losses and objectives
    Mutant(
        "the gradient of rejected tokens has the sign of the chosen ones",
        "redi/losses.py",
        "return -chosen_mean + alpha * rejected_mean",
        "return -chosen_mean - alpha * rejected_mean",
        ("tests/test_losses.py::test_loss_and_gradient_of_the_worked_pair",),
    ),
    Mutant(
        "DPO compares only the chosen trace with the reference",
        "redi/losses.py",
        "(chosen_sum - ref_chosen_sum) - (rejected_sum - ref_rejected_sum)  # (P,)",
        "(chosen_sum - ref_chosen_sum) - rejected_sum  # (P,)",
        ("tests/test_losses.py::test_loss_and_gradient_of_the_worked_pair",),
    ),
    Mutant(
        "DFT sums over a trace's tokens instead of averaging",
        "redi/related_losses.py",
        "(logps.detach().exp() * logps).mean()",
        "(logps.detach().exp() * logps).sum()",
        ("tests/test_losses.py::test_loss_and_gradient_of_the_worked_pair",),
    ),
    Mutant(
        "token weights of REDI are not divided by the number of pairs",
        "redi/objectives.py",
        "return slopes[(signs < 0).long()] / (totals.num_rows * lengths)",
        "return slopes[(signs < 0).long()] / lengths",
        (
            "tests/test_objectives.py"
            "::test_weights_are_exactly_minus_1_and_alpha_over_pairs_and_length",
        ),
    ),
    Mutant(
        "the two traces of a pair may be in different packs although the loss needs both",
        "redi/objectives.py",
        "keep_pairs = True",
        "keep_pairs = False",
        (f"{INVARIANCE}[one pack-simpo-tied-torch.float64]",),
    ),
    Mutant(
        "a pair is compared with the reference log-probs of another row",
        "redi/packing.py",
        "reference[row_ids[0::2]]",
        "reference[sorted(row_ids[0::2])]",
        (f"{INVARIANCE}[one pack-dpo-tied-torch.float64]",),
    ),
    # ---------------------------------------------------------------- log-probs and kernels
    Mutant(
        "the maximum is not subtracted before exponentials are taken",
        "redi/logprobs.py",
        "row_max = logits.amax(dim=1, keepdim=True)",
        "row_max = torch.zeros_like(logits[:, :1])",
        ("tests/test_logprobs.py::test_extreme_logits_are_finite_and_right",),
    ),
    Mutant(
        "token weights are not applied to the gradient",
        "redi/logprobs.py",
        "scale = -weights[:, None] / total",
        "scale = -1.0 / total",
        ("tests/test_logprobs.py::test_value_and_gradients_equal_float64_autograd_for_any_chunks",),
    ),
    Mutant(
        "the gradient of the output weight is that of the last chunk alone",
        "redi/logprobs.py",
        "torch.addmm(d_weight, chunk.T, part, out=d_weight, **head.into_wide)",
        "torch.mm(chunk.T, part, out=d_weight, **head.into_wide)",
        ("tests/test_logprobs.py::test_value_and_gradients_equal_float64_autograd_for_any_chunks",),
    ),
    Mutant(
        "logits of bf16 hidden states are accumulated in bf16",
        "redi/logprobs.py",
        "return torch.promote_types(hidden.dtype, torch.float32)",
        "return hidden.dtype",
        (
            "tests/test_logprobs.py::test_bf16_log_probs_are_fp32_and_log_probs_and_gradients_beat_the_plain_ones",
        ),
    ),
    Mutant(
        "the upstream gradient of the one-pass kernel is ignored",
        "redi/logprobs.py",
        "torch.mul(grad, grad_loss, out=",
        "torch.mul(grad, torch.ones_like(grad_loss), out=",
        ("tests/test_logprobs.py::test_gradcheck",),
    ),
    Mutant(
        "the Triton kernel keeps a running sum unscaled when the maximum moves",
        "redi/kernels.py",
        "sums = sums * tl.exp(maxima - shift) + tl.exp(z - shift)",
        "sums = sums + tl.exp(z - shift)",
        ("tests/test_kernels.py::test_both_kernels_equal_the_formulas_in_float64",),
    ),
    Mutant(
        "the Triton kernel counts the target's exponential twice",
        "redi/kernels.py",
        'z = tl.where(index == target, -float("inf"), z)',
        "z = z + 0.0",
        ("tests/test_kernels.py::test_the_worked_example_of_the_module",),
    ),
    # ---------------------------------------------------------------- model and attention
    Mutant(
        "rotary positions turn the wrong way",
        "redi/model.py",
        "torch.cat([-right, left], dim=-1)",
        "torch.cat([right, -left], dim=-1)",
        ("tests/test_model.py::test_logits_equal_transformers[True-4-16-10000.0]",),
    ),
    Mutant(
        "RMSNorm has no epsilon",
        "redi/model.py",
        "wide.pow(2).mean(-1, keepdim=True) + self.eps)",
        "wide.pow(2).mean(-1, keepdim=True))",
        ("tests/test_model.py::test_logits_equal_transformers[True-4-16-10000.0]",),
    ),
    Mutant(
        "queries have no bias",
        "redi/model.py",
        "self.q_proj(x).view(split_heads)",
        "F.linear(x, self.q_proj.weight).view(split_heads)",
        ("tests/test_model.py::test_logits_equal_transformers[True-4-16-10000.0]",),
    ),
    Mutant(
        "a tied embedding gets no gradient from the head",
        "redi/model.py",
        "return self.model.embed_tokens.weight if self.config.tied",
        "return self.model.embed_tokens.weight.detach() if self.config.tied",
        ("tests/test_model.py::test_parameters_have_transformers_names_and_gradients",),
    ),
    Mutant(
        "tokens see the tokens after them",
        "redi/attention.py",
        "is_causal=True",
        "is_causal=False",
        ("tests/test_model.py::test_attention_equals_a_dense_block_mask",),
    ),
    Mutant(
        "tokens see the documents before their own",
        "redi/attention.py",
        "documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))",
        "documents = [(query, key, value)]",
        ("tests/test_model.py::test_changing_one_document_changes_nothing_in_another",),
    ),
    # ---------------------------------------------------------------- packing
    Mutant(
        "a response is predicted one token too late",
        "redi/packing.py",
        "rows = [start + positions - 1 for",
        "rows = [start + positions for",
        ("tests/test_packing.py::test_rows_and_targets_are_those_of_each_document_alone",),
    ),
    Mutant(
        "the rows of an epoch's last, smaller step are lost",
        "redi/packing.py",
        "starts = range(0, len(order), rows_per_step)",
        "starts = range(0, len(order) - rows_per_step + 1, rows_per_step)",
        (
            "tests/test_packing.py"
            "::test_every_sequence_is_used_once_and_every_step_but_the_last_has_all_its_rows",
        ),
    ),
    Mutant(
        "best fit puts a sequence where it is one token too long",
        "redi/packing.py",
        "bisect.bisect_left(free, (length,))",
        "bisect.bisect_left(free, (length - 1,))",
        ("tests/test_packing.py::test_packs_are_within_the_budget_and_as_many_on_every_rank",),
    ),
    Mutant(
        "positions count on over the documents of a pack",
        "redi/packing.py",
        "np.concatenate([np.arange(length) for length in lengths])",
        "np.arange(sum(lengths))",
        (
            "tests/test_packing.py"
            "::test_documents_of_5_3_and_7_tokens_begin_at_0_5_8_15_and_predict_their_own_responses",
        ),
    ),
    Mutant(
        "every epoch has the order of the first one",
        "redi/packing.py",
        "np.random.default_rng([seed, epoch])",
        "np.random.default_rng([seed, 0])",
        ("tests/test_packing.py::test_epochs_and_seeds_shuffle_differently",),
    ),
    # ---------------------------------------------------------------- the train loop
    Mutant(
        "the learning rate is that of the step before",
        "redi/train.py",
        'group["lr"] = config.lr * lr_factor(number, total)',
        'group["lr"] = config.lr * lr_factor(number - 1, total)',
        ("tests/test_train.py::test_learning_rates_of_a_run_are_logged",),
    ),
    Mutant(
        "gradients are not clipped",
        "redi/train.py",
        "clip_grad_norm_(model.parameters(), config.clip)",
        "clip_grad_norm_(model.parameters(), math.inf)",
        ("tests/test_train.py::test_training_equals_a_plain_loop_of_adamw_with_clipping[0.05]",),
    ),
    Mutant(
        "biases and norms decay too",
        "redi/train.py",
        '"weight_decay": 0.0}',
        '"weight_decay": config.weight_decay}',
        ("tests/test_train.py::test_training_equals_a_plain_loop_of_adamw_with_clipping[1.0]",),
    ),
    Mutant(
        "gradients of a step are added to those of the steps before",
        "redi/train.py",
        "optimizer.zero_grad(set_to_none=True)",
        "pass",
        ("tests/test_train.py::test_training_equals_a_plain_loop_of_adamw_with_clipping[1.0]",),
    ),
    Mutant(
        "the update norm uses the bias correction of the step before",
        "redi/monitor.py",
        'step = state.get("step", torch.zeros_like(total)).double() + 1.0',
        'step = state.get("step", torch.ones_like(total)).double()',
        (
            "tests/test_train.py"
            "::test_the_update_norm_is_that_of_the_difference_of_the_weights[1.0-0.0-redi]",
        ),
    ),
    Mutant(
        "the collapse guard keeps counting after a recovery",
        "redi/monitor.py",
        "self.low = self.low + 1 if fell > self.threshold else 0",
        "self.low = self.low + 1 if fell > self.threshold else self.low",
        ("tests/test_guard.py::test_it_warns_at_these_steps",),
    ),
    # ---------------------------------------------------------------- ranks
    Mutant(
        "gradients are averaged over ranks instead of summed",
        "redi/distributed.py",
        "module.set_gradient_divide_factor(1.0)",
        "pass",
        (f"{RANKS}[('redi', True, torch.float64, 7)]",),
    ),
    Mutant(
        "gradients are exchanged after every pack but the last",
        "redi/distributed.py",
        "model.set_requires_gradient_sync(last)",
        "model.set_requires_gradient_sync(not last)",
        (f"{RANKS}[('redi', True, torch.float64, 7)]",),
    ),
    Mutant(
        "loss and log-probs of a step are those of this rank alone",
        "redi/monitor.py",
        "sum_over_ranks(vector, self.data.world)",
        "pass",
        (f"{RANKS}[('redi', True, torch.float64, 7)]",),
    ),
    Mutant(
        "losses are divided by the counts of this rank instead of the whole step's",
        "redi/batches.py",
        "ids = sequence_ids(step)",
        "ids = sequence_ids([step[self.world.rank]])",
        (f"{INVARIANCE}[2 ranks-redi-tied-torch.float64]",),
    ),
    Mutant(
        "a rank has the reference log-probs of its own rows only",
        "redi/checkpoint/reference.py",
        "sum_over_ranks(sums, data.world)",
        "pass",
        ("tests/test_resume.py::test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16",),
    ),
    Mutant(
        "the update norm counts the weights of every node",
        "redi/train.py",
        "squared_update_norm(optimizer) / world.num_nodes",
        "squared_update_norm(optimizer)",
        ("tests/test_resume.py::test_two_nodes_log_the_update_norm_and_flops_of_one_process",),
    ),
    Mutant(
        "the rows of a weight that does not divide evenly begin at the wrong one",
        "redi/distributed.py",
        "shard_index * -(-len(parameter) // num_shards)",
        "shard_index * (len(parameter) // num_shards)",
        ("tests/test_checkpoint.py::test_rows_saved_by_some_ranks_are_read_by_others",),
    ),
    Mutant(
        "MFU counts the head on every token instead of the supervised ones",
        "redi/train.py",
        "lengths.tolist(), totals.num_tokens)",
        "lengths.tolist(), int(lengths.sum()))",
        ("tests/test_train.py::test_mfu_counts_the_output_weight_on_supervised_tokens_only",),
    ),
    # ---------------------------------------------------------------- checkpoints and resume
    Mutant(
        "a resumed run skips a step",
        "redi/train.py",
        "islice(chain.from_iterable(epochs), begin, total)",
        "islice(chain.from_iterable(epochs), begin + bool(begin), total)",
        ("tests/test_resume.py::test_a_stopped_run_resumes_to_the_same_bits[sft]",),
    ),
    Mutant(
        "Adam's second moment is not in a checkpoint",
        "redi/checkpoint/resume.py",
        'MOMENTS = ("exp_avg", "exp_avg_sq")',
        'MOMENTS = ("exp_avg",)',
        ("tests/test_resume.py::test_a_stopped_run_resumes_to_the_same_bits[sft]",),
    ),
    Mutant(
        "a damaged checkpoint is resumed from",
        "redi/checkpoint/resume.py",
        "if hash_files([path]) != sha256:",
        "if not path.exists():",
        (
            "tests/test_resume.py"
            "::test_a_damaged_checkpoint_is_skipped_for_the_one_before[a flipped bit]",
        ),
    ),
    Mutant(
        "a tied output weight is stored twice",
        "redi/checkpoint/folder.py",
        "in model.state_dict().items():",
        'in {**model.state_dict(), "lm_head.weight": model.output_weight.data.clone()}.items():',
        (
            "tests/test_checkpoint.py"
            "::test_a_tied_head_that_is_stored_and_equal_is_accepted_and_saved_once",
        ),
    ),
    Mutant(
        "every rank reads the first rank's rows of a weight",
        "redi/checkpoint/weights.py",
        "start = seen[name] - first_row(tensors[name])",
        "start = seen[name]",
        ("tests/test_resume.py::test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16",),
    ),
    Mutant(
        "cached reference log-probs are reused for other rows",
        "redi/checkpoint/reference.py",
        "store, rows, str(dtype)]",
        "store, str(dtype)]",
        (
            "tests/test_reference.py"
            "::test_another_model_template_dtype_or_selection_is_another_file",
        ),
    ),
    # ---------------------------------------------------------------- data
    Mutant(
        "|y| does not count the stop token",
        "redi/data/store.py",
        "response_lengths.append(sum(learned) if learned else len(ids))",
        "response_lengths.append(sum(learned) if learned else len(ids) - 1)",
        ("tests/test_train.py::test_stored_tokens_are_the_rendered_rows_that_are_left",),
    ),
    Mutant(
        "a control token quoted in a trace is a control token",
        "redi/data/tokenizer.py",
        "tokenizer.encode_special_tokens = True",
        "tokenizer.encode_special_tokens = False",
        ("tests/test_tokenizer.py::test_a_control_token_in_a_content_is_text",),
    ),
    Mutant(
        "a row exactly as long as the limit is dropped",
        "redi/data/dataset.py",
        "totals - prompts > limits.response",
        "totals - prompts >= limits.response",
        ("tests/test_train.py::test_limits_are_inclusive_and_the_stop_token_counts",),
    ),
    Mutant(
        "chosen and rejected are swapped",
        "redi/data/formats.py",
        'sides = [field for field in fields if field != "prompt"]',
        'sides = [field for field in reversed(fields) if field != "prompt"]',
        ("tests/test_formats.py::test_every_shape_of_a_pair",),
    ),
    # ---------------------------------------------------------------- CUDA, without a GPU
    Mutant(
        "matmuls of the head lose their fp32 results",
        "redi/logprobs.py",
        'self.into_wide = {} if operands == self.dtype else {"out_dtype": self.dtype}',
        "self.into_wide = {}",
        (SFT_STEP,),
    ),
    Mutant(
        "flash attention runs without its flag for shared keys and values",
        "redi/attention.py",
        'grouped = {"enable_gqa": True}',
        "grouped = {}",
        (SFT_STEP,),
    ),
    Mutant(
        "rotary positions stay on the CPU",
        "redi/model.py",
        "positions = torch.arange(length, device=device)",
        "positions = torch.arange(length)",
        (SFT_STEP,),
    ),
    Mutant(
        "a step's statistics are summed on the CPU",
        "redi/monitor.py",
        "dtype=torch.float64, device=data.world.device)",
        "dtype=torch.float64)",
        (SFT_STEP,),
    ),
    Mutant(
        "the statistics of a pack are stored by an index on the CPU",
        "redi/monitor.py",
        "where = to_device(np.searchsorted(self.ids, own), world.device)",
        "where = torch.from_numpy(np.searchsorted(self.ids, own))",
        (SFT_STEP,),
    ),
    Mutant(
        "the host waits for the loss of every pack",
        "redi/objectives.py",
        "loss = per_pair.sum() / totals.num_rows",
        "loss = per_pair.sum() * (1 + 0 * per_pair.sum().item()) / totals.num_rows",
        (DPO_STEP,),
    ),
    Mutant(
        "ranks never exchange gradients",
        "redi/distributed.py",
        "        model.set_requires_gradient_sync(last)",
        "        model.set_requires_gradient_sync(False)",
        (SFT_STEP,),
    ),
    Mutant(
        "a captured decode step asks for the longest row",
        "redi/eval/engine/kernel_steps.py",
        "last = lengths - 1",
        "last = lengths - 1 + 0 * int(lengths.max())",
        (GENERATE,),
    ),
    Mutant(
        "a block of the log-prob kernel is not a power of two",
        "redi/kernels.py",
        "BLOCK = 4096  #",
        "BLOCK = 4000  #",
        (COMPILE,),
    ),
    Mutant(
        "the log-prob kernel sums in bf16",
        "redi/kernels.py",
        "sums = tl.zeros((BLOCK,), tl.float32)",
        "sums = tl.zeros((BLOCK,), tl.bfloat16)",
        (COMPILE,),
    ),
    Mutant(
        "document offsets are int64, which flash attention does not read",
        "redi/packing.py",
        "cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32))",
        "cu_seqlens=torch.from_numpy(cu_seqlens)",
        (SFT_STEP,),
    ),
)
