//! Everything else that hsmd's command line says: help and usage errors, as recorded in
//! `tests/cmd/help.txt`. `UPDATE_TRANSCRIPTS=1` writes it anew.

use std::fs;
use std::path::Path;
use std::process::Command;

const LINES: [&str; 9] = [
    "--help",
    "--version",
    "run --help",
    "check --help",
    "",
    "serve",
    "run --listen /run/hsm/kms.sock",
    "run --health-listen unix:///@hsm",
    "check",
];

#[test]
fn help_and_usage_errors_are_as_recorded() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cmd/help.txt");
    let mut found = String::new();
    for line in LINES {
        let output = Command::new(env!("CARGO_BIN_EXE_hsmd"))
            .args(line.split_whitespace())
            .env_clear()
            .output()
            .expect("hsmd starts");
        found += &format!("$ hsmd {line}\n");
        found += &String::from_utf8_lossy(&output.stdout);
        found += &String::from_utf8_lossy(&output.stderr);
        found += &format!("[exit {}]\n\n", output.status.code().expect("no signal"));
    }
    if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
        fs::write(&golden, &found).expect("writes");
    }
    let recorded = fs::read_to_string(&golden).unwrap_or_default();
    assert!(recorded == found, "other output than recorded:\n\n{found}");
}
