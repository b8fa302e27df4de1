//! The checks tried on samples: each must be able to fail, and must leave alone what is allowed.

use std::path::Path;

use super::{has_unsafe, own_dependencies, wrong_imports, wrong_in_wire};

fn wrong(file: &str, source: &str) -> Vec<String> {
    let modules = [
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
fn a_face_that_imports_another_face_is_found() {
    for source in [
        "use crate::proxy::Call;",
        "use crate::{keyring::Keyring, proxy};",
        "use crate::{\n    peer,\n    proxy::{self as c, Call},\n};",
        "fn f() -> crate::proxy::Call { todo!() }",
        "pub(crate) use super::proxy;",
        "mod tests { use super::super::proxy::Call; }",
        "mod a { mod b {} use super::super::proxy::*; }",
        "/* // */ use crate::proxy;",
        "const Q: char = '\"'; use crate::proxy; const R: &str = \"\";",
        "fn f<'a>(x: &'a str) { crate::proxy::call(x) }",
        "use\n  crate ::\n  proxy;",
    ] {
        assert_eq!(
            wrong("kms/mod.rs", source),
            ["kms/mod.rs imports proxy"],
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
fn a_module_that_knows_the_configuration_is_found() {
    for (file, source, item) in [
        ("kms/mod.rs", "use hsm_config::Config;", "Config"),
        (
            "kms/mod.rs",
            "use hsm_config::{WhenLost, Config as C};",
            "Config",
        ),
        ("kms/mod.rs", "use hsm_config as c;", "hsm_config"),
        ("kms/mod.rs", "use hsm_config;", "hsm_config"),
        ("kms/mod.rs", "use hsm_config::*;", "*"),
        ("keyring/view.rs", "hsm_config::parse(text)", "parse"),
        (
            "pin.rs",
            "use {hsm_config::Token, std::fs}; use hsm_config::pin::Source;",
            "Token",
        ),
        ("health.rs", "use hsm_config::Endpoint;", "Endpoint"),
    ] {
        assert_eq!(
            wrong(file, source),
            [format!("{file} takes {item} from hsm_config")],
            "{source}"
        );
    }
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
    assert_eq!(wrong("keyring.rs", "use crate::{run, kms};").len(), 2);
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
            "// use crate::proxy;\n/* /* use hsm_config; */ crate::run */",
        ),
        (
            "kms/mod.rs",
            "const S: &str = \"use crate::proxy;\"; const C: char = '\\'';",
        ),
        (
            "kms/mod.rs",
            "const R: &str = r#\"\"crate::proxy\"#; fn b() { b\"crate::run\"; }",
        ),
        (
            "kms/mod.rs",
            "mod tests { use super::*; use super::proxy; }",
        ),
        (
            "kms/service.rs",
            "use super::messages::Incoming; use super::proxy;",
        ),
        (
            "kms/mod.rs",
            "use serde::proxy; use other::hsm_config::run;",
        ),
        ("kms/mod.rs", "pub(crate) use hsm_config::WhenLost;"),
        ("pin.rs", "use hsm_config::pin::{PinFile, Source};"),
        (
            "run/mod.rs",
            "use crate::{kms, proxy}; use hsm_config::Config;",
        ),
        ("main.rs", "mod kms; use run::go; use hsm_config::report;"),
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
