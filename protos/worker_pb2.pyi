from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "client", "pid", "queued", "run", "round", "stage", "base_fingerprint", "memory_bytes", "kept_updates", "answered", "refused", "steps", "bytes_down", "bytes_up")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_UPDATES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    version: str
    client: str
    pid: int
    queued: int
    run: str
    round: int
    stage: str
    base_fingerprint: str
    memory_bytes: int
    kept_updates: int
    answered: int
    refused: int
    steps: int
    bytes_down: int
    bytes_up: int
    def __init__(self, version: _Optional[str] = ..., client: _Optional[str] = ..., pid: _Optional[int] = ..., queued: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., stage: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., kept_updates: _Optional[int] = ..., answered: _Optional[int] = ..., refused: _Optional[int] = ..., steps: _Optional[int] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ...) -> None: ...

class WorkMessage(_message.Message):
    __slots__ = ("header", "part")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    header: WorkHeader
    part: PartChunk
    def __init__(self, header: _Optional[_Union[WorkHeader, _Mapping]] = ..., part: _Optional[_Union[PartChunk, _Mapping]] = ...) -> None: ...

class WorkHeader(_message.Message):
    __slots__ = ("job_toml", "manifest", "exchange", "download_ticket", "upload_ticket", "acknowledged", "base_fingerprint")
    JOB_TOML_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_TICKET_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_TICKET_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    job_toml: str
    manifest: bytes
    exchange: str
    download_ticket: str
    upload_ticket: str
    acknowledged: _containers.RepeatedScalarFieldContainer[str]
    base_fingerprint: str
    def __init__(self, job_toml: _Optional[str] = ..., manifest: _Optional[bytes] = ..., exchange: _Optional[str] = ..., download_ticket: _Optional[str] = ..., upload_ticket: _Optional[str] = ..., acknowledged: _Optional[_Iterable[str]] = ..., base_fingerprint: _Optional[str] = ...) -> None: ...

class PartChunk(_message.Message):
    __slots__ = ("sha256", "chunk")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    chunk: bytes
    def __init__(self, sha256: _Optional[str] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class WorkEvent(_message.Message):
    __slots__ = ("queued", "progress", "done", "refused", "payload")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    queued: int
    progress: Progress
    done: Done
    refused: Refused
    payload: bytes
    def __init__(self, queued: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "step", "steps")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    step: int
    steps: int
    def __init__(self, stage: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("manifest", "bytes_down", "bytes_up", "seconds_to_first_step", "seconds", "kept")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_TO_FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    bytes_down: int
    bytes_up: int
    seconds_to_first_step: float
    seconds: float
    kept: bool
    def __init__(self, manifest: _Optional[bytes] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ..., seconds_to_first_step: _Optional[float] = ..., seconds: _Optional[float] = ..., kept: bool = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("code", "detail")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    code: str
    detail: str
    def __init__(self, code: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...
