"""The suite, tested: plausible bugs, put into a copy of the package one at a time, must each make a test fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
CONTRACT, MACHINE, KEPT = "contract/test_contract.py", "contract/test_machine.py", "contract/test_kept_state.py"


@dataclass(frozen=True)
class Mutant:
    """``old``, which is in ``file`` (of the package, or in csrc) once, becomes ``new``; one of ``tests`` must fail."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (MACHINE,)

    @property
    def place(self) -> str:
        """Of the file, from the root."""
        return self.file if self.compiled else f"safefreeze_kernels/{self.file}"

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


MUTANTS: Final = (
    Mutant(
        "decay is applied to frozen weights",
        "kernels/reference.py",
        "            old_p = visit.matrix[here]\n",
        "            param.detach().mul_(own.decay)\n            old_p = visit.matrix[here]\n",
    ),
    Mutant(
        "the clip norm counts frozen gradients",
        "grads/clip.py",
        "self.masks = [local_mask(entry.mask, entry.param) for entry in entries]",
        "self.masks = [FreezeMask(local(entry.param).shape) for entry in entries]",
    ),
    Mutant(
        "polarity is flipped for rows",
        "kernels/parts.py",
        "_C.live_rows(mask.frozen_rows, ",
        "_C.live_rows(mask.live_rows, ",
    ),
    Mutant(
        "rows are off by one",
        "csrc/lists.cpp",
        "run = {row * listed.width,",
        "run = {(row > 0 ? row - 1 : 0) * listed.width,",
    ),
    Mutant(
        "single frozen elements are forgotten",
        "plan/mask.py",
        "        return pack_bits(self.frozen_flags())\n",
        "        return pack_bits(np.zeros(self.matrix_shape, bool))\n",
    ),
    Mutant(
        "a thawed row is as old as the tensor",
        "kernels/ages.py",
        "        flat[thawed] = step[thawed]\n",
        "        flat[thawed] = 0\n",
        (CONTRACT,),
    ),
    Mutant(
        "a thawed row keeps what lay in its place",
        "optim/refreeze.py",
        "        backend.zero_(_listed(others, targets), targets)\n",
        "        [target.fill_(1) for target in targets]\n",
        (CONTRACT,),
    ),
    Mutant(
        "state keeps its places when as much is frozen as before",
        "optim/refreeze.py",
        "as_it_is = was is before and was == new and (",
        "as_it_is = was is before and was.frozen_count == new.frozen_count and (",
    ),
    Mutant(
        "what starts afresh has the moments that were kept",
        "optim/refreeze.py",
        "        _zero([state[change.member.param] for change in whole], thawed, settings)\n",
        "",
        (KEPT,),
    ),
    Mutant(
        "what goes on counts the steps that it stood still",
        "kernels/ages.py",
        "    flat[changed] = step[changed] - flat[changed]\n",
        "",
        (KEPT,),
    ),
    Mutant(
        "rows of different ages become one run",
        "csrc/lists.cpp",
        " || age != run.age",
        "",
        (KEPT,),
    ),
    Mutant(
        "ages are lost on resume",
        "optim/adam.py",
        "self._ages, self._whole = loaded.ages, loaded.whole\n",
        "self._ages, self._whole = {}, loaded.whole\n",
        ("contract/test_optimizer.py",),
    ),
    Mutant(
        "how state was kept is lost on resume",
        "optim/adam.py",
        "self._ages, self._whole = loaded.ages, loaded.whole\n",
        "self._ages = loaded.ages\n",
        (KEPT,),
    ),
    Mutant("the plan is lost when an optimizer is copied", "optim/adam.py", '"_plan", ', ""),
    Mutant(
        "a plan of another checkpoint is taken",
        "optim/state.py",
        "if saved.noted and saved.mask != (mask.fingerprint if mask.frozen_count else None):",
        "if False:",
        ("contract/test_optimizer.py", "contract/test_bad_input.py"),
    ),
    Mutant(
        "found_inf is not looked at",
        "optim/adam.py",
        "if found_inf is not None and self._host_skips(found_inf, valid):",
        "if False:",
    ),
    Mutant(
        "the loss scale is not divided out",
        "optim/launch.py",
        "unscale = 1.0 / grad_scale.detach().float().reshape(())",
        "unscale = torch.ones(())",
        ("contract/test_optimizer.py", "integrations/test_loops.py"),
    ),
    Mutant(
        "the clip factor is dropped",
        "optim/adam.py",
        "        self._pending.put(factor, gradients)\n",
        "",
        ("contract/test_fused_clipping.py",),
    ),
    Mutant(
        "frozen gradients are left as they are",
        "grads/clip.py",
        "    ready.backend(backend, operation).zero_(work, ready.grads)\n",
        "    pass\n",
    ),
    Mutant(
        "guard does not put frozen values back",
        "optim/guard.py",
        "self._backend(shards).scatter_(self._work, targets, self.packed)",
        "pass",
        (CONTRACT,),
    ),
    Mutant(
        "-0.0 counts as 0.0 in a proof",
        "proof/drift.py",
        "differs = (_words(old) != _words(new)).any(dim=1)",
        "differs = (old != new) & ~(old.isnan() & new.isnan())",
        ("contract/test_proof.py",),
    ),
    Mutant(
        "columns are not part of a fingerprint",
        "plan/mask.py",
        '(b"cols", self._cols), ',
        "",
        ("contract/test_masks.py", "contract/test_plan_file.py"),
    ),
    Mutant(
        "a union keeps the second plan alone",
        "plan/mask.py",
        "rows = _union(self._rows, other._rows, self.matrix_shape[0])",
        "rows = other._rows",
        ("contract/test_masks.py",),
    ),
    Mutant(
        "a plan file is written in place",
        "plan/files.py",
        "temporary.replace(path)",
        "path.write_bytes(data[: len(data) // 2]); path.write_bytes(data)",
        ("contract/test_plan_file.py",),
    ),
    Mutant(
        "a plan's checksum is not compared",
        "plan/plan.py",
        'if header.get("checksum") != _checksum(header):',
        "if False:",
        ("contract/test_plan_file.py",),
    ),
    Mutant(
        "live gradients of the wrong rows",
        "grads/linear.py",
        "rows, cols = live.mask.live_rows, live.mask.live_cols",
        "rows, cols = (live.mask.live_rows + 1) % n_rows, live.mask.live_cols",
        ("contract/test_live.py",),
    ),
    Mutant(
        "what wraps a live forward brings it into a copy",
        "grads/forwards.py",
        'return getattr, (self._layer(), "forward")',
        "return (lambda: self), ()",
        ("contract/test_live.py",),
    ),
    Mutant(
        "lent tensors have live gradients",
        "grads/forwards.py",
        " and isinstance(weight, nn.Parameter)):",
        "):",
        ("contract/test_live.py",),
    ),
    Mutant(
        "an expert's gradient goes to its neighbour",
        "grads/experts.py",
        "*(targets[e] for e, _ in spans))",
        "*(targets[e - 1] for e, _ in spans))",
        ("contract/test_live_experts.py",),
    ),
    Mutant(
        "experts computed by other means have whole gradients",
        "grads/experts.py",
        "        alias.register_hook(self._refuse)",
        "        pass",
        ("contract/test_live_experts.py",),
    ),
    Mutant(
        "a packed gradient is taken for an ordinary one",
        "optim/launch.py",
        "self._operands.packed_grads = reader.packed",
        "pass",
        ("contract/test_live.py",),
    ),
    Mutant(
        "a packed gradient by another plan is taken",
        "grads/checks.py",
        "    if packed_by != mask:\n",
        "    if False:\n",
        ("contract/test_live.py",),
    ),
    Mutant(
        "an audit does not look at columns",
        "proof/comparison.py",
        "_flags(cols, window.col, window.cols) if cols.size else None",
        "None",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "an audit tells the place within its block",
        "proof/comparison.py",
        "divmod(window.first + first,",
        "divmod(first,",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "an audit looks at the first name of a weight alone",
        "proof/names.py",
        "if both != usual:",
        "if False:",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "an audit proves past a tensor in which a weight might be found",
        "proof/audit.py",
        "if name in beside and name not in weights.untied:",
        "if False:",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "a file's hash leaves out what nobody compared",
        "proof/checkpoint.py",
        "        self._read_to(start)\n        rest",
        "        self._done = start\n        rest",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "ranks with different plans are not told",
        "model/sharding.py",
        "        if plan != ours:\n            self._note_conflict(f",
        "        if False:\n            self._note_conflict(f",
        ("integrations/test_distributed.py",),
    ),
    Mutant(
        "a load has ranks forget to compare plans",
        "optim/adam.py",
        '        self._pending.invalid = "state was loaded"\n        self._note_plan()\n',
        '        self._pending.invalid = "state was loaded"\n        self._agreement = None\n',
    ),
    Mutant(
        "launch plans outlive a change of live gradients",
        "optim/launch.py",
        "return generation(), [",
        "return 0, [",
    ),
    Mutant(
        "a clip factor outlives the plan",
        "optim/adam.py",
        '            self._pending.invalid = "the plan changed"\n',
        "            pass\n",
    ),
    Mutant(
        "a clip factor outlives its gradients",
        "optim/launch.py",
        "for each in present for g in each):\n                return None",
        "for each in present for g in each):\n                return self.factor",
    ),
    Mutant(
        "a damaged note of the plan is taken as it is",
        "optim/state.py",
        "_expect(isinstance(note.get(key), dict), what,",
        "_expect(True, what,",
    ),
    Mutant(
        "a load keeps the memory it was given",
        "optim/state.py",
        "return tensor.clone() if shared else tensor",
        "return tensor",
    ),
    Mutant(
        "a planned parameter that was replaced is only warned of",
        "optim/checks.py",
        "        if planned:\n            raise ValueError(text)\n",
        "",
    ),
    Mutant(
        "guard looks at steps alone",
        "optim/guard.py",
        "        _watch_methods(optimizer)\n",
        "",
    ),
    Mutant(
        "a first step at rate 0 makes state, whoever asks",
        "optim/state.py",
        "    return frame is not None\n",
        "    return True\n",
    ),
    Mutant(
        "copies of a model have its live gradients",
        "model/attached.py",
        "    vars(module)[_GETSTATE] = partial(_bare_state, weakref.ref(module))\n",
        "",
    ),
    Mutant(
        "a plan means the last of two parameters of a name",
        "plan/binding.py",
        "twice = {name: param for name, param in named if by_name[name] is not param}",
        "twice = dict[str, Tensor]()",
    ),
    Mutant(
        "zero has a master below it",
        "kernels/reference.py",
        "    return torch.where(master.isnan(), (stored << 16).view(torch.float32), master)\n",
        "    return master\n",
    ),
    Mutant(
        "compiled: frozen single elements are overwritten",
        "csrc/places.h",
        "return {at<const uint8_t>(part.frozen_bits), start, 0, frozen ? 0u : ~0u};",
        "return {at<const uint8_t>(part.frozen_bits), start, 0, frozen ? 0u : 0u};",
    ),
    Mutant(
        "compiled: moments of single elements lie as if none of the run was frozen",
        "csrc/places.h",
        "packed{run.packed + (part.gapless ? picked : done)};",
        "packed{run.packed + done};",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: frozen single elements among kept state are stepped",
        "csrc/cpu.cpp",
        "uint32_t live = some.bytes ? some.sixteen(i) : 0xffffu;",
        "uint32_t live = 0xffffu;",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: ages of newly frozen elements turn as those of newly thawed ones",
        "csrc/moves.cpp",
        "{~was & ~now, was & ~now, ~was & now, was & now}",
        "{~was & ~now, ~was & now, was & ~now, was & now}",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: moments of single elements move to where the new plan has others",
        "csrc/moves.cpp",
        "_mm512_maskz_expand_epi32(static_cast<__mmask16>(was), load_16(from))",
        "_mm512_maskz_expand_epi32(static_cast<__mmask16>(now), load_16(from))",
        ("contract/test_optimizer.py", "contract/test_kept_state.py", "kernels/test_kernels.py"),
    ),
    Mutant(
        "compiled: a thawed element is as old as its tensor",
        "csrc/cpu.cpp",
        "aged.bias2_sqrt[i] = row.bias2_sqrt;",
        "aged.bias2_sqrt[i] = rows->bias2_sqrt;",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "the state of a loaded checkpoint has gaps",
        "optim/state.py",
        "return repack(moment, others, mask) if",
        "return moment if",
        ("contract/test_optimizer.py",),
    ),
    Mutant(
        "CUDA: a thread forgets how many elements those before it found",
        "csrc/cuda_places.cuh",
        "before += i < threadIdx.x / group ? of_group[i] : 0;",
        "before += 0;",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA: an element is looked for in the row before its own",
        "csrc/cuda_places.cuh",
        "0xffffffffu / width + 1 : 0",
        "0xffffffffu / width : 0",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA: a NaN is left as the hardware rounds it",
        "csrc/cuda_adamw.cuh",
        "    values.finish();\n",
        "",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA: sums of denormals stay as they were first counted",
        "csrc/cuda.cu",
        "found < tiny) found = norm_of_share<P, kind, true>(work, tensors);",
        "found < tiny) found = norm_of_share<P, kind, false>(work, tensors);",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "8 bits: v is rounded to nearest, and stands still",
        "kernels/reference.py",
        "code = ((v_bits + (noise >> 11) >> 21)",
        "code = ((v_bits + 0x100000 >> 21)",
        ("kernels/test_codes.py",),
    ),
    Mutant(
        "8 bits: the smallest v become 0",
        "kernels/reference.py",
        ".clamp(1, 509).where(v_bits != 0, 0)",
        ".clamp(0, 509)",
        ("kernels/test_codes.py",),
    ),
    Mutant(
        "8 bits: the noise of every run of elements is that of the first",
        "csrc/cpu_codes.h",
        "begin = noise_begin(key, first);",
        "begin = noise_begin(key, 0);",
    ),
    Mutant(
        "compiled: eps is added before the root is taken",
        "csrc/arithmetic.h",
        "denominator(square_root(second_moment), s)",
        "denominator(square_root(second_moment + s.eps), s)",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: a product with a reciprocal is taken for the quotient",
        "csrc/arithmetic.h",
        "multiply_add(rest, reciprocal, product) + s.eps",
        "product + s.eps",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: moments beyond the 8-bit codes are coded like others",
        "csrc/cpu_codes.h",
        "!_kortestz_mask16_u8(special, beyond)",
        "false",
        ("kernels/test_codes.py",),
    ),
    Mutant(
        "compiled: bfloat16 is cut off, not rounded",
        "csrc/arithmetic.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        "bits >> 16;",
        ("kernels/test_kernels.py",),
    ),
    Mutant(
        "compiled: an audit takes the first columns' flags for all",
        "csrc/audit.cpp",
        "chosen = v.frozen_cols + col;",
        "chosen = v.frozen_cols;",
        ("contract/test_audit.py",),
    ),
    Mutant(
        "CUDA: frozen single elements in a tail are overwritten",
        "csrc/cuda_places.cuh",
        "const uint32_t bit = part.frozen_bits ? bits_of<1>(part, tile.start + here) ^ none : 1u;",
        "const uint32_t bit = 1u;",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA: the sums of a norm are read before all are written",
        "csrc/cuda.cu",
        "of_some[threadIdx.x] = value;\n  }\n  __syncthreads();",
        "of_some[threadIdx.x] = value;\n  }",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "Triton: frozen single elements are overwritten",
        "kernels/triton.py",
        "            if BITS and WIDE:\n                new_p = tl.where(frozen, old_p, new_p)\n",
        "",
        ("kernels/test_triton.py",),
    ),
    Mutant(
        "Triton: places of packed moments are those of the weights",
        "kernels/triton.py",
        "m_ptr = pointer_to(m_at, STATE, WIDE) + there",
        "m_ptr = pointer_to(m_at, STATE, WIDE) + here",
        ("kernels/test_triton.py",),
    ),
    Mutant(
        "moments in 8 bits are rounded to nearest",
        "kernels/reference.py",
        "new_state = [*encode_moments(m, v, noise),",
        "new_state = [*encode_moments(m, v),",
    ),
    Mutant(
        "a NaN in 8 bits is infinity",
        "csrc/arithmetic.h",
        "(v_bits > 0x7f800000u ? Word{} + 511u : Word{} + 510u)",
        "(v_bits > 0x7f800000u ? Word{} + 510u : Word{} + 510u)",
        ("kernels/test_codes.py",),
    ),
    Mutant(
        "gradients stay after a step inside the backward pass",
        "optim/backward.py",
        "            param.grad = None\n",
        "            pass\n",
    ),
    Mutant(
        "what passes before the block left alone is not stepped",
        "optim/backward.py",
        "[p for p in self.members if p.grad is not None and p not in self._seen]",
        "[]",
    ),
    Mutant(
        "a step inside the backward pass counts on from before other parameters were stepped",
        "optim/backward.py",
        "        together = together and all(self._of_param.get(param) is plans for param in params)\n",
        "",
        ("contract/test_step_in_backward.py",),
    ),
    Mutant(
        "a step inside the backward pass goes on with an earlier plan",
        "optim/backward.py",
        "as_before = masks is optimizer._masks and ages is optimizer._ages\n",
        "as_before = masks is not None\n",
        ("contract/test_step_in_backward.py",),
    ),
    Mutant(
        "CUDA: nobody waits for what the first thread prepares",
        "csrc/cuda_adamw.cuh",
        "  if (threadIdx.x == 0) task.prepare(launch);\n  __syncthreads();\n",
        "  if (threadIdx.x == 0) task.prepare(launch);\n",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA: nobody waits for the counts of other threads",
        "csrc/cuda_places.cuh",
        "static_cast<uint16_t>(__popc(mine));\n    __syncthreads();\n",
        "static_cast<uint16_t>(__popc(mine));\n",
        ("kernels/test_cuda.py",),
    ),
    Mutant(
        "CUDA, as compiled: packed places of a list are one too far",
        "csrc/cuda_places.cuh",
        "there = at<const uint32_t>(part.packed_cols)[listed] + within;",
        "there = at<const uint32_t>(part.packed_cols)[listed] + within + 1;",
        ("kernels/test_ptx.py",),
    ),
    Mutant(
        "Triton, as compiled: gradients are read where moments are",
        "kernels/triton.py",
        "of_grad = here if WIDE else tl.where(packed_grad, there, here)",
        "of_grad = here if WIDE else there",
        ("kernels/test_ptx.py",),
    ),
)


def copied(folder: Path) -> Path:
    """Package, sources of the extension, and tests, in a folder of their own."""
    for name in ("safefreeze_kernels", "csrc", "tests", "examples", "benchmarks", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def built(folder: Path) -> None:
    """Compile the copy's extension anew, without CUDA."""
    for old in (folder / "safefreeze_kernels").glob("_C.*.so"):
        old.unlink()
    environment = {**os.environ, "SAFEFREEZE_CUDA": "0", "SAFEFREEZE_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def suite(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Those tests on the copy; they stop at the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    files = [str(folder / "tests" / name) for name in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_mutant_is_one_change(mutant: Mutant) -> None:
    """So that the slow test below, which few run, does not rot."""
    text = (ROOT / mutant.place).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} of {mutant.old!r}"
    if not mutant.compiled:
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_every_mutant_is_caught(tmp_path: Path, mutant: Mutant) -> None:
    file = copied(tmp_path) / mutant.place
    file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    if mutant.compiled and not mutant.file.startswith("csrc/cuda"):  # which its tests compile themselves
        built(tmp_path)
    found = suite(tmp_path, mutant.tests)
    assert found.returncode not in (0, 5), f"{mutant.bug}: all of {', '.join(mutant.tests)} pass"
    # a test that failed, or an interpreter that died: not a suite that did not start
    assert "FAILED" in found.stdout or found.returncode < 0, found.stdout[-3000:]


@pytest.mark.slow
def test_the_copy_itself_passes(tmp_path: Path) -> None:
    """Without a mutant the tests pass, so it is the mutant they fail by."""
    tests = tuple(sorted({name for mutant in MUTANTS for name in mutant.tests}))
    found = suite(copied(tmp_path), tests)
    assert found.returncode == 0, found.stdout[-3000:]
