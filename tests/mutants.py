"""Mutants of the core: one-line faults, and the tests that must notice each.

tests/test_mutants.py applies each to a copy of the tree and expects the listed tests to fail
(`make test-slow`). When code moves, change the text below; keep the fault. After a line with the
file, every mutant has

  what is wrong in the mutated code
  - a text that occurs once in the file
  + what replaces it
    the cheapest tests that must fail, one to three, as pytest node ids; those of the next mutant if
    there are none
"""

import re
from dataclasses import dataclass


@dataclass
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


STEP = "test_cuda_without_a_gpu.py::test_a_training_step_waits_once_and_exchanges_each_block_once"
SHORT = {  # names for node ids
    "RANKS": "test_ranks.py::test_ranks_together_give_the_loss_and_gradients_of_one_alone",
    "INVARIANCE": "test_invariance.py::test_any_plan_gives_the_papers_loss_and_gradients",
    "SFT_STEP": f"{STEP}[train-step objective=sft world_size=8]",
    "DPO_STEP": f"{STEP}[train-step objective=dpo world_size=8]",
    "GENERATE": "test_cuda_without_a_gpu.py"
    "::test_a_captured_decode_step_never_waits_for_the_device[generate]",
    "COMPILE": "test_cuda_without_a_gpu.py"
    "::test_kernels_fit_the_gpu_spill_nothing_and_load_16_bytes_at_a_time[compile capability=90]",
}

TEXT = r"""
redi/losses.py
  the gradient of rejected tokens has the sign of the chosen ones
  - return -chosen_mean + alpha * rejected_mean
  + return -chosen_mean - alpha * rejected_mean
  DPO compares only the chosen trace with the reference
  - (chosen_sum - ref_chosen_sum) - (rejected_sum - ref_rejected_sum)  # (P,)
  + (chosen_sum - ref_chosen_sum) - rejected_sum  # (P,)
    test_losses.py::test_loss_and_gradient_of_the_worked_pair
redi/related_losses.py
  DFT sums over a trace's tokens instead of averaging
  - (logps.detach().exp() * logps).mean()
  + (logps.detach().exp() * logps).sum()
    test_losses.py::test_loss_and_gradient_of_the_worked_pair
redi/objectives.py
  token weights of REDI are not divided by the number of pairs
  - (by_mean[side] + by_sum[side] * lengths) / (totals.num_pairs * lengths)
  + (by_mean[side] + by_sum[side] * lengths) / lengths
    test_objectives.py::test_weights_are_exactly_minus_1_and_alpha_over_pairs_and_length
  the two traces of a pair may be in different packs although the loss needs both
  - NonlinearObjective(loss, arguments, keep_pairs="signs" not in arguments)
  + NonlinearObjective(loss, arguments, keep_pairs=False)
    INVARIANCE[one pack-simpo-tied-torch.float64]
  the host waits for the loss of every pack
  - loss = (losses * weights).sum()
  + loss = (losses * weights).sum() * (1 + 0 * losses.sum().item())
    DPO_STEP
redi/packing.py
  the weight of a labeled row has no effect
  - weights = weights * torch.tensor([s.weight for s in sequences], dtype=torch.float64)
  + weights = weights.double()
    test_labeled_rows.py::test_any_plan_gives_the_loss_and_gradients_of_the_formula[1-1000-redi]
  a pair is compared with the reference log-probs of another row
  - reference_sums[row_ids[0::2]]
  + reference_sums[sorted(row_ids[0::2])]
    INVARIANCE[one pack-dpo-tied-torch.float64]
  a response is predicted one token too late
  - rows = [start + positions - 1 for
  + rows = [start + positions for
    test_packing.py::test_rows_and_targets_are_those_of_each_document_alone
  the rows of an epoch's last, smaller step are lost
  - starts = range(0, len(order), rows_per_step)
  + starts = range(0, len(order) - rows_per_step + 1, rows_per_step)
  best fit puts a sequence where it is one token too long
  - bisect.bisect_left(free, (length,))
  + bisect.bisect_left(free, (length - 1,))
    test_packing.py::test_every_sequence_is_used_once_in_full_steps_of_packs_within_the_budget
  positions count on over the documents of a pack
  - np.concatenate([np.arange(length) for length in lengths])
  + np.arange(sum(lengths))
    test_packing.py::test_documents_of_5_3_and_7_tokens_begin_at_0_5_8_15_and_predict_their_own
  every epoch has the order of the first one
  - np.random.default_rng([seed, epoch])
  + np.random.default_rng([seed, 0])
    test_packing.py::test_epochs_and_seeds_shuffle_differently
  document offsets are int64, which flash attention does not read
  - cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32))
  + cu_seqlens=torch.from_numpy(cu_seqlens)
    SFT_STEP
redi/logprobs.py
  the maximum is not subtracted before exponentials are taken
  - row_max = logits.amax(dim=1, keepdim=True)
  + row_max = torch.zeros_like(logits[:, :1])
    test_logprobs.py::test_float32_is_right_to_float32_without_a_denormal_number
  token weights are not applied to the gradient
  - scale = -weights[:, None] / total
  + scale = -1.0 / total
  the gradient of the output weight is that of the last chunk alone
  - torch.addmm(d_weight, unscaled.T, part * scale, out=d_weight)
  + torch.mm(unscaled.T, part * scale, out=d_weight)
    test_logprobs.py::test_value_and_gradients_equal_float64_autograd_for_any_chunks
  logits of bf16 hidden states are accumulated in bf16
  - return torch.promote_types(hidden.dtype, torch.float32)
  + return hidden.dtype
    test_logprobs.py::test_bf16_log_probs_are_fp32_and_log_probs_and_gradients_beat_the_plain_ones
  the upstream gradient of the one-pass kernel is ignored
  - torch.mul(grad, grad_loss, out=
  + torch.mul(grad, torch.ones_like(grad_loss), out=
    test_logprobs.py::test_backward_scales_with_the_upstream_gradient_and_may_run_again
  matmuls of the head lose their fp32 results
  - self.into_wide = {} if operands == self.dtype else {"out_dtype": self.dtype}
  + self.into_wide = {}
    SFT_STEP
redi/kernels.py
  the Triton kernel keeps a running sum unscaled when the maximum moves
  - sums = sums * tl.exp(maxima - shift) + tl.exp(z - shift)
  + sums = sums + tl.exp(z - shift)
  the Triton kernel counts the target's exponential twice
  - z = tl.where(index == target, -float("inf"), z)
  + z = z + 0.0
    test_kernels.py::test_the_kernel_equals_the_formulas_in_float64
  a block of the log-prob kernel is not a power of two
  - BLOCK = 4096  #
  + BLOCK = 4000  #
  the log-prob kernel sums in bf16
  - sums = tl.zeros((BLOCK,), tl.float32)
  + sums = tl.zeros((BLOCK,), tl.bfloat16)
    COMPILE
redi/fused.py
  rotary positions turn the wrong way
  - [left * cos - right * sin, right * cos + left * sin]
  + [left * cos + right * sin, right * cos - left * sin]
redi/model.py
  norms have another epsilon than the configuration's
  - self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
  + self.norm = nn.RMSNorm(config.hidden_size)
  queries have no bias
  - self.q_proj(x).view(split_heads)
  + F.linear(x, self.q_proj.weight).view(split_heads)
    test_model.py::test_logits_equal_transformers[True-4-16-10000.0]
  a tied embedding gets no gradient from the head
  - return self.model.embed_tokens.weight if self.config.tied
  + return self.model.embed_tokens.weight.detach() if self.config.tied
    test_model.py::test_parameters_have_transformers_names_and_gradients
  rotary positions stay on the CPU
  - positions = torch.arange(config.max_positions, device=device)
  + positions = torch.arange(config.max_positions)
    SFT_STEP
redi/attention.py
  tokens see the tokens after them
  - is_causal=True
  + is_causal=False
  tokens see the documents before their own
  - documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
  + documents = [(query, key, value)]
    test_model.py::test_attention_equals_a_dense_block_mask
  flash attention runs without its flag for shared keys and values
  - grouped = {"enable_gqa": True}
  + grouped = {}
    SFT_STEP
redi/train.py
  the learning rate is that of the step before
  - group["lr"] = config.lr * lr_factor(number, total)
  + group["lr"] = config.lr * lr_factor(number - 1, total)
    test_train.py::test_learning_rates_of_a_run_are_logged
  gradients are not clipped
  - clip_grad_norm_(model.parameters(), config.clip)
  + clip_grad_norm_(model.parameters(), math.inf)
    test_train.py::test_training_equals_a_plain_loop_of_adamw_with_clipping[0.05]
  biases and norms decay too
  - "weight_decay": 0.0}
  + "weight_decay": config.weight_decay}
  gradients of a step are added to those of the steps before
  - optimizer.zero_grad(set_to_none=True)
  + pass
    test_train.py::test_training_equals_a_plain_loop_of_adamw_with_clipping[1.0]
  the update norm counts the weights of a rank for every rank
  - squared_update_norm(optimizer)
  + squared_update_norm(optimizer) * world.world_size
    test_resume.py::test_two_ranks_log_the_update_norm_and_flops_of_one_process
  MFU counts the head on every token instead of the supervised ones
  - lengths.tolist(), num_supervised)
  + lengths.tolist(), int(lengths.sum()))
    test_train.py::test_mfu_counts_the_output_weight_on_supervised_tokens_only
  a resumed run skips a step
  - islice(chain.from_iterable(epochs), begin, total)
  + islice(chain.from_iterable(epochs), begin + bool(begin), total)
    test_resume.py::test_a_stopped_run_resumes_to_the_same_bits[sft]
redi/monitor.py
  the update norm uses the bias correction of the step before
  - .get("step", total).double() + 1.0
  + .get("step", total + 1.0).double()
    test_train.py::test_the_update_norm_is_that_of_the_difference_of_the_weights[1.0-0.0-redi]
  the collapse guard keeps counting after a recovery
  - self.low = self.low + 1 if fell > self.threshold else 0
  + self.low = self.low + 1 if fell > self.threshold else self.low
    test_guard.py::test_it_warns_at_these_steps
  loss and log-probs of a step are those of this rank alone
  - sum_over_ranks(vector, self.data.world)
  + pass
    RANKS[('redi', True, torch.float64, 7, 'qwen2')]
  a step's statistics are summed on the CPU
  - dtype=torch.float64, device=data.world.device)
  + dtype=torch.float64)
  the statistics of a pack are stored by an index on the CPU
  - where = to_device(np.searchsorted(self.ids, own), world.device)
  + where = torch.from_numpy(np.searchsorted(self.ids, own))
    SFT_STEP
redi/distributed.py
  gradients are averaged over ranks instead of summed
  - module.set_gradient_divide_factor(1.0)
  + pass
  gradients are exchanged after every pack but the last
  - model.set_requires_gradient_sync(last)
  + model.set_requires_gradient_sync(not last)
    RANKS[('redi', True, torch.float64, 7, 'qwen2')]
  the rows of a weight that does not divide evenly begin at the wrong one
  - mesh.get_local_rank() * -(-len(parameter) // mesh.size())
  + mesh.get_local_rank() * (len(parameter) // mesh.size())
    test_checkpoint.py::test_rows_saved_by_some_ranks_are_read_by_others
  ranks never exchange gradients
  -         model.set_requires_gradient_sync(last)
  +         model.set_requires_gradient_sync(False)
    SFT_STEP
redi/batches.py
  losses are divided by the counts of this rank instead of the whole step's
  - ids = sequence_ids(step)
  + ids = sequence_ids([step[self.world.rank]])
    INVARIANCE[2 ranks-redi-tied-torch.float64]
redi/checkpoint/reference.py
  a rank has the reference log-probs of its own rows only
  - sum_over_ranks(sums, data.world)
  + pass
    test_resume.py::test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16
  cached reference log-probs are reused for other rows
  - store, rows, str(dtype)]
  + store, str(dtype)]
    test_reference.py::test_another_model_template_dtype_or_selection_is_another_file
redi/checkpoint/resume.py
  Adam's second moment is not in a checkpoint
  - MOMENTS = ("exp_avg", "exp_avg_sq")
  + MOMENTS = ("exp_avg",)
    test_resume.py::test_a_stopped_run_resumes_to_the_same_bits[sft]
  a damaged checkpoint is resumed from
  - if hash_files([path]) != sha256:
  + if not path.exists():
    test_resume.py::test_a_damaged_checkpoint_is_skipped_for_the_one_before[a flipped bit]
redi/checkpoint/folder.py
  a tied output weight is stored twice
  - in model.state_dict().items():
  + in {**model.state_dict(), "lm_head.weight": model.output_weight.data.clone()}.items():
    test_checkpoint.py::test_a_tied_head_that_is_stored_and_equal_is_accepted_and_saved_once
redi/checkpoint/weights.py
  every rank reads the first rank's rows of a weight
  - start = seen[name] - first_row(tensors[name])
  + start = seen[name]
    test_resume.py::test_dpo_learns_the_same_on_one_rank_and_on_two_and_in_bfloat16
redi/data/store.py
  |y| does not count the stop token
  - index["response_lengths"].append(sum(learned) if learned else len(ids))
  + index["response_lengths"].append(sum(learned) if learned else len(ids) - 1)
    test_train.py::test_stored_tokens_are_the_rendered_rows_that_are_left
redi/data/tokenizer.py
  a control token quoted in a trace is a control token
  - tokenizer.encode_special_tokens = True
  + tokenizer.encode_special_tokens = False
    test_tokenizer.py::test_a_control_token_in_a_content_is_text
redi/data/dataset.py
  a row exactly as long as the limit is dropped
  - totals - prompts > config.max_response
  + totals - prompts >= config.max_response
    test_train.py::test_limits_are_inclusive_and_the_stop_token_counts
redi/data/formats.py
  wrong rows are learned like right ones
  - return float(weight if label else -weight)
  + return float(weight)
    test_labeled_rows.py::test_the_store_keeps_the_sign_and_weight_of_every_row
  chosen and rejected are swapped
  - sides = [field for field in fields if field not in ("prompt", "label")]
  + sides = [field for field in reversed(fields) if field not in ("prompt", "label")]
    test_formats.py::test_every_shape_of_a_pair
redi/eval/engine/kernel_steps.py
  a captured decode step asks for the longest row
  - last = lengths - 1
  + last = lengths - 1 + 0 * int(lengths.max())
    GENERATE
"""


def parse(text: str) -> list[Mutant]:
    for short, node_id in SHORT.items():
        text = text.replace(f"    {short}", f"    {node_id}")
    mutants = []
    for file, part in re.findall(r"^(redi/.+)\n((?:  .+\n)+)", text, re.MULTILINE):
        for name, old, new, tests in re.findall(
            r"^  (\S.+)\n  - (.+)\n  \+ (.+)\n((?:    .+\n)*)", part, re.MULTILINE
        ):
            node_ids = tuple(f"tests/{test.strip()}" for test in tests.splitlines())
            mutants.append(Mutant(name, file, old, new, node_ids))
    for mutant, after in zip(mutants[-2::-1], mutants[:0:-1]):
        mutant.tests = mutant.tests or after.tests
    return mutants


MUTANTS = parse(TEXT)
