"""The cluster lab's certificates: who they are for, who vouches for them, who may read the keys."""

import ipaddress
import stat

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.cluster.certificates import Authority, Identity


def issued(folder, identity):
    authority = Authority(folder)
    authority.issue(identity)
    return (
        x509.load_pem_x509_certificate(authority.file.read_bytes()),
        x509.load_pem_x509_certificate((folder / f"{identity.file}.crt").read_bytes()),
    )


def test_a_client_is_named_by_user_and_group_and_signed_by_the_authority(tmp_path):
    ca, certificate = issued(tmp_path, Identity("node-1", "system:node:node-1", "system:nodes"))

    subject = certificate.subject
    assert subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "system:node:node-1"
    assert subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "system:nodes"
    certificate.verify_directly_issued_by(ca)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_server_is_known_by_all_its_addresses_and_names(tmp_path):
    _, certificate = issued(
        tmp_path, Identity("apiserver", "kube-apiserver", addresses=("10.96.0.1", "localhost"))
    )

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.96.0.1")]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_keys_are_readable_for_their_owner_only(tmp_path):
    issued(tmp_path, Identity("admin", "admin", "system:masters"))

    assert stat.S_IMODE((tmp_path / "admin.key").stat().st_mode) == 0o600
