from kdscale.cluster.security import Authority
from kdscale.config.sections import TeacherSection
from kdscale.stream.protocol import Meaning
from kdscale.teacher.replica import ReplicaSetup


def test_setup_shows_no_secret():
    credentials = Authority().issue()
    setup = ReplicaSetup(
        teacher=TeacherSection(model="some/teacher"),
        directory="/models/teacher",
        meaning=Meaning("teacher", "tokenizer", 100, 32),
        network="127.0.0.0/8",
        token="secret",
        credentials=credentials,
        deterministic=False,
    )
    assert repr(setup) == "ReplicaSetup(directory='/models/teacher', token=..., tls=True)"
