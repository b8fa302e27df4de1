//! The checks tried on samples: each must be able to fail, and must leave alone what is allowed.

use std::path::Path;

use super::{has_unsafe, own_dependencies, wrong_imports, wrong_in_wire};

fn wrong(file: &str, source: &str) -> Vec<String> {
    let modules = [
        "config",
        "keyring",
        "kms",
        "listen",
        "peer",
        "proxy",
        "run",
        "telemetry",
    ];
    let modules = modules.map(str::to_owned);
    wrong_imports(Path::new(file), source, &modules)
}

#[test]
fn a_face_that_imports_config_or_another_face_is_found() {
    for source in [
        "use crate::config::Config;",
        "use crate::{keyring::Keyring, config};",
        "use crate::{\n    peer,\n    config::{self as c, Config},\n};",
        "fn f() -> crate::config::Config { todo!() }",
        "pub(crate) use super::config;",
        "mod tests { use super::super::config::Config; }",
        "mod a { mod b {} use super::super::config::*; }",
        "/* // */ use crate::config;",
        "const Q: char = '\"'; use crate::config; const R: &str = \"\";",
        "fn f<'a>(x: &'a str) { crate::config::load(x) }",
        "use\n  crate ::\n  config;",
    ] {
        assert_eq!(
            wrong("kms/mod.rs", source),
            ["kms/mod.rs imports config"],
            "{source}"
        );
    }
    assert_eq!(
        wrong("kms/service.rs", "use super::super::proxy::Call;"),
        ["kms/service.rs imports proxy"]
    );
    assert_eq!(
        wrong("kms.rs", "use crate::proxy;"),
        ["kms.rs imports proxy"]
    );
}

#[test]
fn a_leaf_that_imports_run_or_a_face_is_found() {
    assert_eq!(
        wrong("listen/path.rs", "use crate::run::stop;"),
        ["listen/path.rs imports run"]
    );
    assert_eq!(
        wrong("peer.rs", "use crate::kms::Face;"),
        ["peer.rs imports kms"]
    );
    assert_eq!(
        wrong("config/mod.rs", "use crate::run;"),
        ["config/mod.rs imports run"]
    );
    assert_eq!(wrong("keyring.rs", "use crate::{config, kms};").len(), 2);
}

#[test]
fn what_is_allowed_is_not_found() {
    for (file, source) in [
        (
            "kms/mod.rs",
            "use crate::{keyring::Keyring, listen, peer::Peer, telemetry};",
        ),
        (
            "kms/mod.rs",
            "// use crate::config;\n/* /* use crate::config; */ crate::run */",
        ),
        (
            "kms/mod.rs",
            "const S: &str = \"use crate::config;\"; const C: char = '\\'';",
        ),
        (
            "kms/mod.rs",
            "const R: &str = r#\"\"crate::config\"#; fn b() { b\"crate::run\"; }",
        ),
        (
            "kms/mod.rs",
            "mod tests { use super::*; use super::config; }",
        ),
        (
            "kms/service.rs",
            "use super::messages::Incoming; use super::config;",
        ),
        (
            "kms/mod.rs",
            "use serde::config; use other::crate_config::run;",
        ),
        ("config/mod.rs", "use crate::kms::WhenLost;"),
        ("run/mod.rs", "use crate::{config, kms, proxy};"),
        ("main.rs", "mod kms; use run::go; use crate::config;"),
    ] {
        assert_eq!(wrong(file, source), [""; 0], "{file}: {source}");
    }
}

#[test]
fn a_clock_or_a_file_in_wire_is_found() {
    for source in [
        "use std::fs;",
        "use std::{fmt, io::Read};",
        "use std::time::{Duration, Instant};",
        "use std::time;",
        "use std::{time::{self, Duration}};",
        "fn now() { std::time::SystemTime::now(); }",
        "use core::net::IpAddr;",
        "use std::*;",
        "fn f() { std::thread::sleep(d) }",
    ] {
        assert_eq!(wrong_in_wire(source).len(), 1, "{source}");
    }
    let allowed =
        "//! std::fs\nuse std::fmt; use std::time::Duration; use std::collections::HashMap;";
    assert_eq!(wrong_in_wire(allowed), [""; 0]);
}

#[test]
fn unsafe_code_is_found_and_talk_of_it_is_not() {
    assert!(has_unsafe("fn f() { unsafe { g() } }"));
    assert!(has_unsafe("unsafe impl Send for X {}"));
    assert!(!has_unsafe(
        "// unsafe\n#![forbid(unsafe_code)] const X: &str = \"unsafe\";"
    ));
}

#[test]
fn a_dependency_on_a_crate_above_is_found() {
    let manifest = "[dependencies]\nbytes.workspace = true\nhsm-token-client.workspace = true\n\
        hsm-wire = { path = \"../wire\" }\n[dev-dependencies]\nhsm-pki.workspace = true\n";
    assert_eq!(own_dependencies(manifest), ["hsm-token-client", "hsm-wire"]);
}
