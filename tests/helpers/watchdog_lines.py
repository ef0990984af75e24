"""Lines that workers wrote when another one had failed or hung, recorded from gloo, the store and NCCL of several
versions of torch; ranks, hosts and numbers changed, and stacks shortened."""

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "train.py", line 16, in <module>',
    "    dist.all_reduce(t)",
    "    ^^^^^^^^^^^^^^^^^^",
]
FRAMES = [
    "Exception raised from checkTimeout at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:632 (most recent "
    "call first):",
    "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f83f296c1b6 in libc10.so)",
    *(f"frame #{n}: <unknown function> + 0xdfc74 (0x15554f329c74 in libstdc++.so.6)" for n in range(1, 12)),
    "",
]
GLOO_RESET = [
    *TRACEBACK,
    "RuntimeError: [gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:22945: Connection reset by peer. This is "
    "typically caused by a remote worker hanging or bugs in the application. Check the logs of the remote worker "
    "before reporting an error. GLHF!",
]
GLOO_TIMEOUT = [
    *TRACEBACK,
    "RuntimeError: [transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
]
STORE_TIMEOUT = [
    "[rank0]:[W1129 13:04:25.343177556 socket.cpp:469] [c10d] waitForInput: poll for socket SocketImpl(fd=13, "
    "addr=[::ffff:127.0.0.1]:41792, remote=[::ffff:127.0.0.1]:29713) returned 0, likely a timeout",
    *TRACEBACK,
    "torch.distributed.DistStoreError: wait timeout after 2000ms, keys: /default_pg/0//x",
]
STORE_CLOSED = [
    *TRACEBACK,
    "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
    "server shutdown or crash?",
]
REMOTE_ERROR = [
    *TRACEBACK,
    "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote "
    "process exited or there was a network error, NCCL version 2.21.5",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "Last error:",
    "socketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection reset by peer",
]
ABORTED_COMMUNICATOR = [
    *TRACEBACK,
    "RuntimeError: NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog caught "
    "collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1809553 "
    "milliseconds before timing out.",
]
DUMP_SIGNAL = [
    "[rank3]:[E901 05:20:03.110823792 ProcessGroupNCCL.cpp:1685] [PG ID 0 PG GUID 0(default_pg) Rank 3] Observed "
    "flight recorder dump signal from another rank via TCPStore.",
    "[rank3]:[E901 05:20:03.110956967 ProcessGroupNCCL.cpp:1746] [PG ID 0 PG GUID 0(default_pg) Rank 3] Received a "
    "dump signal due to a collective timeout from  rank 1 and we will try our best to dump the debug info. Last "
    "enqueued NCCL work: 807, last completed NCCL work: 807.This is most likely caused by incorrect usages of "
    "collectives, e.g., wrong sizes used across ranks, the order of collectives is not same for all ranks or the "
    "scheduled collective, for some reason, didn't run.",
]
HEARTBEAT_MONITOR = [
    "[rank1]:[E626 05:14:36.393067540 ProcessGroupNCCL.cpp:1743] [PG ID 0 PG GUID 0(default_pg) Rank 1] "
    "ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress in monitoring enqueued collectives. "
    "This typically indicates a NCCL/CUDA API (e.g., CudaEventDestroy) hang blocking the watchdog, and could be "
    "triggered by another thread holding the GIL inside a CUDA api",
]
CUDA_ERROR = [
    "[rank2]:[E314 14:33:46.588302933 ProcessGroupNCCL.cpp:1595] [PG ID 0 PG GUID 0(default_pg) Rank 2] Process group "
    "watchdog thread terminated with exception: CUDA error: an illegal memory access was encountered",
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.",
    *FRAMES,
    "terminate called after throwing an instance of 'c10::DistBackendError'",
    "  what():  [PG ID 0 PG GUID 0(default_pg) Rank 2] Process group watchdog thread terminated with exception: CUDA "
    "error: an illegal memory access was encountered",
]


def watchdog(rank: int, *, enqueued: int = 811, completed: int = 807, group: int = 0, torch: str = "2.9") -> list[str]:
    """What NCCL's watchdog writes on a rank whose collective has timed out, before it aborts the process."""
    timeout = (
        f"[Rank {rank}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE, "
        "NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for 600020 milliseconds before timing out."
    )
    if torch == "1.13":
        return [
            f"[E ProcessGroupNCCL.cpp:828] {timeout}",
            "[E ProcessGroupNCCL.cpp:455] Some NCCL operations have failed or timed out. Due to the asynchronous "
            "nature of CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.",
            "[E ProcessGroupNCCL.cpp:460] To avoid data inconsistency, we are taking the entire process down.",
            "terminate called after throwing an instance of 'std::runtime_error'",
            f"  what():  {timeout}",
        ]
    prefix = f"[rank{rank}]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp"
    names = (
        f"[PG {group} Rank {rank}]" if torch == "2.4" else f"[PG ID {group} PG GUID {group}(default_pg) Rank {rank}]"
    )
    numbers = (
        f"{prefix}:1664] {names} Exception (either an error or timeout) detected by watchdog at work: 808, last "
        f"enqueued NCCL work: {enqueued}, last completed NCCL work: {completed}."
        if torch == "2.4"
        else f"{prefix}:2268] {names}  failure detected by watchdog at work sequence id: 808 PG status: last enqueued "
        f"work: {enqueued}, last completed work: {completed}"
    )
    return [
        f"{prefix}:632] {timeout}",
        numbers,
        f"{prefix}:670] Stack trace of the failed collective not found, potentially because FlightRecorder is "
        "disabled.",
        f"{prefix}:684] [Rank {rank}] Some NCCL operations have failed or timed out. Due to the asynchronous nature of "
        "CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.",
        f"{prefix}:690] [Rank {rank}] To avoid data inconsistency, we are taking the entire process down.",
        f"{prefix}:1899] {names} Process group watchdog thread terminated with exception: {timeout}",
        *FRAMES,
        "terminate called after throwing an instance of 'c10::DistBackendError'",
        f"  what():  {names} Process group watchdog thread terminated with exception: {timeout}",
        *FRAMES,
        *FRAMES,
    ]
