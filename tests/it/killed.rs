//! The program killed, stopped and out of disk while it runs: the same command goes on to the same bytes.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use crate::helpers::{Lab, copy, demo, digests, entries, text_of};

/// The demo model's four branches, small enough to be made many times.
fn card(lab: &Lab, out: &str, more: &[&str]) -> Vec<String> {
    let (model, text, out) =
        (text_of(&demo("")), text_of(&demo("calibration.parquet")), text_of(&lab.path(out)));
    let flags = ["--model", &model, "--dataset", &text, "--out", &out, "--samples", "16", "--seq-len", "256"];
    lab.quantize_args(&[&flags[..], more].concat())
}

/// Waits until the run says that so many layers are finished; false when it ends before.
fn wait_for_layer(child: &mut Child, layer: usize) -> bool {
    wait_for_line(child, &format!("layer {layer}/"))
}

/// Waits until the run prints a line that begins so; false when it ends before.
fn wait_for_line(child: &mut Child, begin: &str) -> bool {
    let lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    lines.map_while(Result::ok).any(|line| line.starts_with(begin))
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

fn ends_with(mut child: Child) -> (Option<i32>, String) {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (child.wait().unwrap().code(), text)
}

#[test]
fn killed_at_twenty_moments_it_goes_on_to_the_same_bytes() {
    let lab = Lab::empty();
    let begun = Instant::now();
    lab.run(&card(&lab, "whole", &[])).succeeds();
    let whole = begun.elapsed();
    let expected = digests(&lab.path("whole"));

    let mut moments = 0x2545_F491_4F6C_DD1D_u64;
    let (mut kills, mut finished) = (0, 0);
    while kills < 20 {
        let mut child = lab.start(&card(&lab, "killed", &[]));
        // xorshift; from the start of the program to a little more than a layer.
        moments ^= moments << 13;
        moments ^= moments >> 7;
        moments ^= moments << 17;
        let moment = whole.mul_f64(0.05 + 0.5 * (moments % 1000) as f64 / 1000.0);
        thread::sleep(moment);
        if child.try_wait().unwrap().is_some() {
            assert!(child.wait().unwrap().success(), "{}", ends_with(child).1);
            assert_eq!(digests(&lab.path("killed")), expected);
            fs::remove_dir_all(lab.path("killed")).unwrap();
            finished += 1;
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        // Killed between its last work and its end: there is nothing to go on with.
        if lab.path("killed").exists() && entries(&lab.path("killed")) == entries(&lab.path("whole")) {
            assert_eq!(digests(&lab.path("killed")), expected);
            fs::remove_dir_all(lab.path("killed")).unwrap();
            finished += 1;
        }
    }
    let output = lab.run(&card(&lab, "killed", &[])).succeeds();
    assert_eq!(digests(&lab.path("killed")), expected, "{output:?}, finished {finished} times before");
    assert_eq!(entries(&lab.path("killed")), entries(&lab.path("whole")));
}

/// What it leaves of a rotated model is a folder.
#[test]
fn killed_while_it_has_a_rotated_model_it_begins_again() {
    let lab = Lab::empty();
    let more = ["--quality", "fast", "--rotate", "--variant", "4bit-128g"];
    lab.run(&card(&lab, "whole", &more)).succeeds();
    let journal = lab.path("killed/.journal.partial");
    let rotated = || journal.is_dir() && entries(&journal).iter().any(|name| name.starts_with("rotated-"));
    let mut child = lab.start(&card(&lab, "killed", &more));
    while !rotated() {
        assert!(child.try_wait().unwrap().is_none(), "{}", ends_with(child).1);
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(rotated());
    lab.run(&card(&lab, "killed", &more)).succeeds();
    assert_eq!(digests(&lab.path("killed")), digests(&lab.path("whole")));
    assert_eq!(entries(&lab.path("killed")), entries(&lab.path("whole")));
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn the_program_starts_itself_again_with_settings_of_libraries() {
    let lab = Lab::empty();
    let mut child = lab.start(&card(&lab, "out", &[]));
    assert!(wait_for_layer(&mut child, 1));
    let variables = fs::read(format!("/proc/{}/environ", child.id())).unwrap();
    let name = |variable: &[u8]| {
        String::from_utf8_lossy(variable.split(|&byte| byte == b'=').next().unwrap()).into_owned()
    };
    let names: Vec<String> = variables.split(|&byte| byte == 0).map(name).collect();
    for setting in ["OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES"] {
        assert_eq!(names.iter().filter(|name| *name == setting).count(), 1, "{names:?}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_signal_leaves_a_state_to_go_on_from_and_a_second_one_too() {
    let lab = Lab::empty();
    lab.run(&card(&lab, "whole", &[])).succeeds();
    for (name, again) in [("TERM", false), ("INT", true)] {
        let mut child = lab.start(&card(&lab, name, &[]));
        assert!(wait_for_layer(&mut child, 1));
        signal(&child, name);
        if again {
            signal(&child, name);
        }
        let (code, said) = ends_with(child);
        if again {
            // At once, or stopped already.
            assert_eq!(code, Some(130), "{said}");
        } else {
            assert_eq!(code, Some(143), "{said}");
            assert!(said.contains("error: stopped on request"), "{said}");
            assert!(said.contains(" of 4 layers are kept in "), "{said}");
            assert!(said.contains("; resume with: gptq quantize "), "{said}");
        }
        let output = lab.run(&card(&lab, name, &[])).succeeds();
        assert!(output.stderr.contains("resuming: "), "{}", output.stderr);
        assert_eq!(digests(&lab.path(name)), digests(&lab.path("whole")));
    }
}

#[test]
fn an_interrupt_while_gradients_are_taken_keeps_them() {
    let lab = Lab::empty();
    let more = ["--quality", "best", "--variant", "4bit-128g"];
    lab.run(&card(&lab, "whole", &more)).succeeds();
    let args = card(&lab, "out", &more);
    let mut child = lab.start(&args);
    assert!(wait_for_line(&mut child, "gradients: "));
    signal(&child, "INT");
    let (code, said) = ends_with(child);
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("gradients of ") && said.contains(" of 16 windows are kept in "), "{said}");
    let resume = said.split("resume with: gptq ").nth(1).unwrap().lines().next().unwrap();
    assert_eq!(resume, args.join(" "));
    assert_eq!(entries(&lab.path("out")), [".journal.partial"]);

    // Other settings would lose them.
    let refused = lab.run(&card(&lab, "out", &["--quality", "best", "--variant", "4bit-32g"]));
    assert!(refused.stderr.contains("holds a run with other settings (0 of 4 layers"), "{}", refused.stderr);

    let output = lab.run(&args).succeeds();
    assert!(output.stderr.contains("resuming: gradients of "), "{}", output.stderr);
    assert_eq!(digests(&lab.path("out")), digests(&lab.path("whole")));
    assert_eq!(entries(&lab.path("out")), entries(&lab.path("whole")));
}

#[test]
fn two_runs_do_not_write_to_one_folder() {
    let lab = Lab::empty();
    let mut child = lab.start(&card(&lab, "out", &[]));
    assert!(wait_for_layer(&mut child, 1));
    let output = lab.run(&card(&lab, "out", &[]));
    assert_eq!(
        (output.code, output.stderr.lines().next()),
        (Some(2), Some("error: another run is writing to `[LAB]/out`"))
    );
    let (code, said) = ends_with(child);
    assert_eq!(code, Some(0), "{said}");
}

/// A file system of `megabytes` on a folder, gone when dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, megabytes: usize) -> Self {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={megabytes}m");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).status();
        assert!(status.unwrap().success(), "a small file system needs the right to mount one");
        Self(at)
    }

    fn free(&self) -> u64 {
        gptq::machine::available_space(self.0).unwrap()
    }

    /// Leaves so many bytes free.
    fn fill(&self, leave: u64) {
        // Others write to it meanwhile, so that this may end early.
        let filled = fs::write(self.0.join("filler"), vec![0; self.free().saturating_sub(leave) as usize]);
        assert!(filled.is_ok() || self.free() < leave + 65_536, "{filled:?}");
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Runs until a layer is finished, fills the disk, and returns what the run says when it ends.
fn fill_after_layer(lab: &Lab, args: &[String], layer: usize, fill: impl FnOnce()) -> String {
    let mut child = lab.start(args);
    assert!(wait_for_layer(&mut child, layer));
    fill();
    let (code, said) = ends_with(child);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("No space left on device (os error 28)"), "{said}");
    assert!(
        said.contains("hint: the disk is full: free some space and start the same command again"),
        "{said}"
    );
    said
}

#[test]
fn a_disk_that_fills_up_costs_nothing_with_small_disk() {
    let lab = Lab::empty();
    lab.run(&card(&lab, "whole", &[])).succeeds();
    let whole = lab.path("whole");

    // The journal's disk.
    let journals = lab.path("journals");
    let disk = SmallDisk::mount(&journals, 64);
    let args = card(&lab, "out", &["--journal-dir", &text_of(&journals)]);
    let said = fill_after_layer(&lab, &args, 1, || disk.fill(0));
    assert!(said.contains("/hidden-"), "{said}");
    assert!(said.contains("1 of 4 layers are kept in "), "{said}");
    disk.make_room();
    lab.run(&args).succeeds();
    assert_eq!(digests(&lab.path("out")), digests(&whole));
    drop(disk);

    // The output's: the weights have their room from the start, the files after them and the report do not.
    let small = lab.path("small");
    let disk = SmallDisk::mount(&small, 128);
    let args = card(&lab, "small/out", &["--journal-dir", &text_of(&lab.path("elsewhere"))]);
    let said = fill_after_layer(&lab, &args, 3, || disk.fill(0));
    assert!(said.contains(".partial/"), "{said}");
    let out = small.join("out");
    assert!(entries(&out).iter().all(|name| name.ends_with(".partial")), "{:?}", entries(&out));
    disk.make_room();
    let others: u64 = branch_files(&whole).map(|bytes| bytes.next_multiple_of(4096)).sum();
    // Room for the configs of all branches, and hardly more.
    disk.fill(others + 8192);
    let output = lab.run(&args);
    assert!(output.stderr.contains("run.json`: No space left"), "{}", output.stderr);
    disk.make_room();
    lab.run(&args).succeeds();
    assert_eq!(digests(&out), digests(&whole));
    assert!(out.join("run.json").exists());
    let copied = lab.path("copied");
    copy(&out, &copied);
    assert_eq!(entries(&copied), entries(&whole));
}

/// Sizes of the branches' files beside the weights.
fn branch_files(out: &Path) -> impl Iterator<Item = u64> {
    let folders = entries(out).into_iter().map(|name| out.join(name)).filter(|path| path.is_dir());
    let files = folders.flat_map(|dir| entries(&dir).into_iter().map(move |name| dir.join(name)));
    let files = files.filter(|path| path.extension().is_none_or(|end| end != "safetensors"));
    files.map(|path| path.metadata().unwrap().len()).collect::<Vec<_>>().into_iter()
}
