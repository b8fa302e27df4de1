//! `hsmd check FILE`, as a person sees it: each `tests/cmd/check/NAME.yaml` gives `NAME.txt`.
//!
//! The transcripts are compared byte by byte. `UPDATE_TRANSCRIPTS=1 cargo test -p hsmd --test check`
//! writes them anew; read the difference before committing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Written into the files wherever a secret could stand by mistake.
const CANARIES: [&str; 3] = ["canary", "hunter2", "20261234"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cmd/check")
}

fn check(folder: &Path, file: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hsmd"))
        .args(["check", file])
        .current_dir(folder)
        .env_clear()
        .output()
        .expect("hsmd starts")
}

fn transcript(file: &str, output: &Output) -> String {
    let mut text = format!("$ hsmd check {file}\n");
    text += &String::from_utf8_lossy(&output.stdout);
    text += &String::from_utf8_lossy(&output.stderr);
    text += &format!("[exit {}]\n", output.status.code().expect("no signal"));
    text
}

fn files() -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(folder())
        .expect("the folder of transcripts")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    files.sort();
    assert!(files.len() > 60, "only {} files", files.len());
    files
}

#[test]
fn every_file_gives_its_transcript() {
    let mut changed = Vec::new();
    for file in files() {
        let found = transcript(&file, &check(&folder(), &file));
        let golden = folder().join(&file).with_extension("txt");
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            fs::write(&golden, &found).expect("writes");
        } else if fs::read_to_string(&golden).unwrap_or_default() != found {
            changed.push(found);
        }
    }
    assert!(
        changed.is_empty(),
        "other output than recorded:\n\n{}",
        changed.join("\n")
    );
}

#[test]
fn what_is_wrong_goes_to_stderr_with_exit_code_1_and_what_is_right_to_stdout_with_0() {
    for (file, code) in [
        ("defaults.yaml", 0),
        ("empty.yaml", 1),
        ("no-such-file.yaml", 1),
    ] {
        let output = check(&folder(), file);
        assert_eq!(output.status.code(), Some(code), "{file}");
        assert_eq!(output.stdout.is_empty(), code == 1, "{file}");
        assert_eq!(output.stderr.is_empty(), code == 0, "{file}");
    }
}

#[test]
fn no_output_repeats_a_pin_that_somebody_wrote_into_the_file() {
    let mut with_canary = 0;
    for file in files() {
        let text = fs::read_to_string(folder().join(&file)).expect("reads");
        with_canary += usize::from(CANARIES.iter().any(|canary| text.contains(canary)));
        let shown = transcript("", &check(&folder(), &file));
        for canary in CANARIES {
            assert!(
                !shown.contains(canary),
                "{file} gives {canary} away:\n{shown}"
            );
        }
    }
    assert!(with_canary >= 15, "only {with_canary} files hold one");
}

#[test]
fn limits_come_before_the_parser() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, content, word) in [
        (
            "long",
            vec![b'#'; 256 * 1024 + 1],
            "longer than 262144 bytes",
        ),
        (
            "latin",
            b"cluster: a\ntokens: caf\xe9\n".to_vec(),
            "not UTF-8 text, from line 2 on",
        ),
        ("zero", b"cluster: a\0b\n".to_vec(), "not valid YAML"),
        (
            "brackets",
            vec![b'['; 200_000],
            "more than 64 brackets are open",
        ),
    ] {
        fs::write(folder.path().join(name), content).expect("writes");
        let output = check(folder.path(), name);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr.starts_with(&format!("error: {name}:")), "{stderr}");
        assert!(stderr.contains(word), "{stderr}");
    }
    let output = check(folder.path(), ".");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("the file cannot be read\ncaused by: Is a directory"),
        "{stderr}"
    );
}
