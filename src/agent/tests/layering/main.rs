//! The code map's invariants that no compiler checks (`src/README.md`): who may import whom, where
//! `unsafe` may stand, and that the bytes know neither files nor clocks.
//!
//! It reads the sources as text: paths, written in a `use` or in the middle of an expression, with
//! comments and strings taken out first. The checks themselves are tried on bad samples below.

mod paths;
mod samples;

use std::fs;
use std::path::{Path, PathBuf};

use paths::{paths, tokens};

/// Modules of the daemon that answer somebody. Those that do not exist yet are bound already.
const FACES: [&str; 3] = ["kms", "proxy", "sops"];
/// What a face may import of the daemon.
const FACE_MAY_IMPORT: [&str; 4] = ["keyring", "listen", "peer", "telemetry"];
/// The crate of the configuration file, and what the daemon's modules may take from it: a face or a
/// leaf gets checked values, so it names their types at most. `main`, `run` and `check` may take all.
const CONFIG: &str = "hsm_config";
const MAY_TAKE_FROM_CONFIG: [(&str, &[&str]); 6] = [
    ("keyring", &["ClusterNames", "KeyRule", "KeyState"]),
    ("kms", &["WhenLost"]),
    ("listen", &["Endpoint"]),
    ("peer", &["Endpoint", "Rules"]),
    ("pin", &["pin"]),
    ("reload", &["MAX_BYTES"]),
];
/// Wires everything to everything: the one module besides `main` that may.
const RUN: &str = "run";

/// What the bytes must not know: `std` without I/O, clock, processes and environment.
const FORBIDDEN_IN_WIRE: [&str; 9] = [
    "std::env",
    "std::fs",
    "std::io",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// Crates whose sources may contain `unsafe`: they touch PKCS#11's C interface.
const MAY_BE_UNSAFE: [&str; 2] = ["token", "module"];

/// Crates of this workspace, and those that each may depend on.
const MAY_DEPEND_ON: [(&str, &[&str]); 6] = [
    ("wire", &[]),
    ("token", &["hsm-wire"]),
    ("token-client", &["hsm-wire"]),
    ("config", &["hsm-token-client", "hsm-wire"]),
    ("agent", &["hsm-config", "hsm-token-client", "hsm-wire"]),
    ("forge", &["hsm-config", "hsm-token-client", "hsm-wire"]),
];

fn src() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every `.rs` file below `folder`, as its path from there and its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("a source folder is readable") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source is readable");
                let path = path.strip_prefix(folder).expect("it lies below");
                found.push((path.to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {}", folder.display());
    found.sort();
    found
}

/// The module of the daemon that a file belongs to: `kms/service.rs` → `["kms", "service"]`.
fn module_of(file: &Path) -> Vec<&str> {
    let mut names: Vec<&str> = file
        .components()
        .filter_map(|component| component.as_os_str().to_str())
        .collect();
    let last = names.pop().unwrap_or_default().trim_end_matches(".rs");
    if !matches!(last, "mod" | "main" | "lib") {
        names.push(last);
    }
    names
}

/// Which of the daemon's imports break the code map: `file imports module`.
fn wrong_imports(file: &Path, source: &str, modules: &[String]) -> Vec<String> {
    let here = module_of(file);
    let top = here.first().copied().unwrap_or("main");
    let paths = paths(source, &here);
    let of_crate = paths
        .iter()
        .filter_map(|path| path.strip_prefix("crate::"))
        .map(|path| path.split("::").next().unwrap_or(path))
        .filter(|imported| *imported != top && modules.iter().any(|module| module == imported))
        .filter(|imported| !may_import(top, imported));
    let of_config = paths
        .iter()
        .filter(|path| path.split("::").next() == Some(CONFIG))
        .map(|path| path.strip_prefix("hsm_config::").unwrap_or(path))
        .filter(|item| !may_take_from_config(top, item));
    let mut wrong: Vec<String> = of_crate
        .map(|imported| format!("{} imports {imported}", file.display()))
        .chain(of_config.map(|item| format!("{} takes {item} from {CONFIG}", file.display())))
        .collect();
    wrong.sort();
    wrong.dedup();
    wrong
}

fn may_import(module: &str, imported: &str) -> bool {
    match module {
        "main" | RUN => true,
        face if FACES.contains(&face) => FACE_MAY_IMPORT.contains(&imported),
        _ => imported != RUN && !FACES.contains(&imported),
    }
}

fn may_take_from_config(module: &str, item: &str) -> bool {
    let name = item.split("::").next().unwrap_or(item);
    matches!(module, "main" | "check" | RUN)
        || MAY_TAKE_FROM_CONFIG
            .iter()
            .any(|(taker, items)| *taker == module && items.contains(&name))
}

fn wrong_in_wire(source: &str) -> Vec<String> {
    paths(source, &[])
        .into_iter()
        .filter(|path| {
            let path = path.replacen("core::", "std::", 1);
            // The module as a whole gives its members under a name that is not looked for.
            matches!(
                path.as_str(),
                "std::time" | "std::time::*" | "std::time::self" | "std::*"
            ) || FORBIDDEN_IN_WIRE
                .iter()
                .any(|forbidden| path == *forbidden || path.starts_with(&format!("{forbidden}::")))
        })
        .collect()
}

fn has_unsafe(source: &str) -> bool {
    tokens(source).contains(&"unsafe")
}

/// Crates of this workspace in `[dependencies]` and `[build-dependencies]`; tests may use others.
fn own_dependencies(manifest: &str) -> Vec<&str> {
    let mut counts = false;
    manifest
        .lines()
        .filter_map(|line| {
            if line.starts_with('[') {
                counts = matches!(line.trim(), "[dependencies]" | "[build-dependencies]")
                    || line.starts_with("[target.") && !line.contains("dev-dependencies");
            }
            let name = line.split(['.', ' ', '=']).next()?;
            (counts && (name.starts_with("hsm") || name == "e2e")).then_some(name)
        })
        .collect()
}

#[test]
fn a_face_imports_keyring_listen_peer_and_telemetry_only_and_nothing_imports_run() {
    let sources = sources(&src().join("agent/src"));
    let mut modules: Vec<String> = sources
        .iter()
        .filter_map(|(file, _)| module_of(file).first().map(|name| (*name).to_owned()))
        .collect();
    modules.dedup();
    assert!(modules.iter().any(|module| module == "kms"), "{modules:?}");
    let wrong: Vec<String> = sources
        .iter()
        .flat_map(|(file, source)| wrong_imports(file, source, &modules))
        .collect();
    assert!(wrong.is_empty(), "see src/README.md: {wrong:#?}");
}

#[test]
fn wire_knows_no_file_no_socket_no_clock_and_no_process() {
    for (file, source) in sources(&src().join("wire/src")) {
        let wrong = wrong_in_wire(&source);
        assert!(
            wrong.is_empty(),
            "src/wire/src/{}: {wrong:?}",
            file.display()
        );
    }
}

#[test]
fn unsafe_stands_only_where_the_c_interface_of_pkcs_11_is_touched() {
    let wrong: Vec<String> = sources(&src())
        .into_iter()
        .filter(|(file, source)| {
            let may = MAY_BE_UNSAFE.iter().any(|may| file.starts_with(may));
            !may && has_unsafe(source)
        })
        .map(|(file, _)| format!("src/{}", file.display()))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    for (name, may) in MAY_DEPEND_ON {
        let path = src().join(name).join("Cargo.toml");
        let manifest = fs::read_to_string(&path).expect("a manifest is readable");
        for dependency in own_dependencies(&manifest) {
            assert!(
                may.contains(&dependency),
                "src/{name} depends on {dependency}"
            );
        }
    }
}
