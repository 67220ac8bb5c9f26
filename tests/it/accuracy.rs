//! What is done beyond plain GPTQ: what presets turn on, that it shows where it should and nowhere else, and that it helps.

use serde_json::{Value, json};

use crate::{
    helpers::{Lab, demo, read_json, text_of},
    safetensors_file,
    tiny_model::Model,
};

const OFF: [&str; 9] = [
    "--unsigned-scales",
    "--scale-search",
    "off",
    "--act-group-aware",
    "false",
    "--asymmetric",
    "0",
    "--shrinkage",
    "false",
];

#[test]
fn presets_say_what_they_turn_on_and_files_hold_it() {
    let lab = Lab::new();
    let output = lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    let said = "quality standard: equalized norms, signed scales, scale search by block, group-aware order, \
                asymmetric calibration at 1, damping by shrinkage";
    assert!(output.stderr.contains(said), "{}", output.stderr);
    let accuracy = json!({
        "signed_scales": true, "scale_search": "block", "act_group_aware": true, "asymmetric": 1.0,
        "output_hessian": 0.0, "rotate": false, "equalize": true, "shrinkage": true,
    });
    let report = read_json(&lab.out().join("run.json"));
    assert_eq!((&report["plan"]["quality"], &report["accuracy"]), (&"standard".into(), &accuracy));
    let config = &read_json(&lab.branch().join("config.json"))["quantization_config"];
    assert_eq!((&config["desc_act"], &config["act_group_aware"]), (&false.into(), &true.into()));
    assert_eq!(config["meta"]["quality"], "standard");
    for (key, value) in accuracy.as_object().unwrap() {
        assert_eq!(config["meta"][key], *value, "{key}");
    }

    let out = text_of(&lab.path("fast"));
    let output = lab.quantize(&["--variant", "4bit-32g", "--quality", "fast", "--out", &out]).succeeds();
    assert!(output.stderr.contains("quality fast: plain GPTQ\n"), "{}", output.stderr);
}

#[test]
fn fast_is_what_is_left_with_everything_off() {
    let lab = Lab::new();
    let variants =
        ["--variant", "4bit-32g", "--variant", "4bit-32g-act", "--variant", "3bit-48g-static-asym"];
    let [fast, off] = ["fast", "off"].map(|name| text_of(&lab.path(name)));
    lab.quantize(&[&variants[..], &["--quality", "fast", "--damp", "0.05", "--out", &fast]].concat())
        .succeeds();
    lab.quantize(&[&variants[..], &OFF, &["--out", &off]].concat()).succeeds();
    for branch in ["gptq-4bit-32g-actorder_False", "gptq-4bit-32g-actorder_True"] {
        let [fast, off] =
            ["fast", "off"].map(|name| safetensors_file::read_folder(&lab.path(name).join(branch)));
        assert!(fast == off, "{branch}");
    }
}

#[test]
fn negative_scales_are_used_told_of_and_turned_off() {
    let lab = Lab::new();
    let signs = |flags: &[&str], name: &str| {
        let out = text_of(&lab.path(name));
        let common = ["--variant", "4bit-32g-act", "--out", &out];
        lab.quantize(&[&common[..], flags].concat()).succeeds();
        let branch = lab.path(name).join("gptq-4bit-32g-actorder_True");
        // Every linear with the matmul that runs it, against fp64.
        let verified =
            lab.verify(&branch, &["--against", &text_of(&lab.model()), "--device", "cpu", "--json"]).json();
        let negative = safetensors_file::read_folder(&branch)
            .iter()
            .filter(|(name, _)| name.ends_with(".scales"))
            .map(|(_, scales)| scales.halves().iter().filter(|s| s.to_f32() < 0.0).count() as u64)
            .sum::<u64>();
        assert_eq!(verified["scales"]["negative"], negative);
        (negative, verified["scales"]["all"].as_u64().unwrap())
    };
    let (negative, all) = signs(&[], "standard");
    assert!(negative > all / 4 && negative < all * 3 / 4, "{negative} of {all}");
    let text = lab.verify(&lab.path("standard/gptq-4bit-32g-actorder_True"), &[]).succeeds().stdout;
    assert!(text.contains(&format!("{negative} of {all} scales are negative")), "{text}");
    assert_eq!(signs(&["--unsigned-scales"], "unsigned").0, 0);
    assert_eq!(signs(&["--quality", "fast"], "fast").0, 0);
}

/// Of a model whose sizes are no powers of two, with all that a rotation has to go through.
#[test]
fn a_rotated_branch_computes_what_the_model_does() {
    let lab =
        Lab::with(&Model { hidden: 96, heads: 4, kv_heads: 2, tied: true, biases: true, ..Model::default() });
    let said = "quality standard: folded rotations, signed scales";
    let output = lab.quantize(&["--variant", "8bit-32g", "--rotate"]).succeeds();
    assert!(output.stderr.contains(said), "{}", output.stderr);
    let branch = lab.branch();
    let config = read_json(&branch.join("config.json"));
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(config["quantization_config"]["meta"]["rotate"], true);
    // About as close as the branch that was not rotated: its random weights are uniform, which no rotation makes better.
    let out = text_of(&lab.path("plain"));
    lab.quantize(&["--variant", "8bit-32g", "--out", &out]).succeeds();
    let evaluation = lab.eval(&[&branch, &lab.path("plain/gptq-8bit-32g-actorder_False")]);
    let [rotated, plain] =
        [0, 1].map(|i| evaluation["models"][i]["kl_divergence"]["value"].as_f64().unwrap());
    assert!(rotated < 4.0 * plain, "{rotated} {plain}");
    lab.verify(&branch, &[]).succeeds();
    let against = ["--against", &text_of(&lab.model()), "--json"];
    assert!(lab.verify(&branch, &against).json()["distances"].as_array().unwrap().len() == 14);
}

/// Each linear's damping, in a run that needs to raise none.
fn damping(report: &Value) -> Vec<f64> {
    let linears = report["branches"][0]["linears"].as_array().unwrap();
    assert!(linears.iter().all(|linear| linear["damp_raised"] == 0), "{linears:?}");
    linears.iter().map(|linear| linear["damp"].as_f64().unwrap()).collect()
}

#[test]
fn damping_by_shrinkage_is_more_where_tokens_are_few_and_never_less_than_asked_for() {
    let lab = Lab::new();
    let run = |samples: &str, flags: &[&str]| {
        let out = lab.path(&[&[samples], flags].concat().concat());
        let (out, report) = (text_of(&out), out.join("run.json"));
        let common = ["--variant", "4bit-32g", "--quality", "fast", "--samples", samples, "--out", &out];
        let output = lab.quantize(&[&common[..], flags].concat()).succeeds();
        assert!(!output.stderr.contains("raised"), "{}", output.stderr);
        (damping(&read_json(&report)), output.stderr)
    };
    assert!(run("2", &[]).0.iter().all(|&damp| damp == 0.01));
    let (few, said) = run("2", &["--shrinkage"]);
    assert!(said.contains("quality fast: damping by shrinkage\n"), "{said}");
    let (many, _) = run("16", &["--shrinkage"]);
    assert_eq!(few.len(), 14);
    for (few, many) in few.iter().zip(&many) {
        assert!(*few > 2.0 * many && *few <= 1.0 && *many >= 0.01, "{few} {many}");
    }
    assert!(run("2", &["--shrinkage", "--damp", "1"]).0.iter().all(|&damp| damp == 1.0));
}

/// Of the bundled model, 32 windows of 256 tokens; the evaluation is on text that is not among them.
#[test]
fn each_preset_is_closer_to_the_model_than_the_one_before() {
    let lab = Lab::empty();
    let (model, text) = (text_of(&demo("")), text_of(&demo("calibration.parquet")));
    let divergences = |quality: &str| -> Vec<f64> {
        let out = text_of(&lab.path(quality));
        let evaluation = text_of(&demo("evaluation.parquet"));
        let flags = ["--model", &model, "--dataset", &text, "--out", &out, "--quality", quality, "--json"];
        let shape = ["--samples", "32", "--seq-len", "256", "--eval", &evaluation, "--eval-windows", "16"];
        let variants = ["--variant", "4bit-128g", "--variant", "4bit-128g-act"];
        let report = lab.quantize(&[&flags[..], &shape, &variants].concat()).json();
        let models = report["evaluations"][0]["models"].as_array().unwrap();
        models.iter().map(|m: &Value| m["kl_divergence"]["value"].as_f64().unwrap()).collect()
    };
    let [fast, standard, best] = ["fast", "standard", "best"].map(divergences);
    for branch in 0..fast.len() {
        let [fast, standard, best] = [&fast, &standard, &best].map(|of| of[branch]);
        assert!(standard < 0.9 * fast && best < standard, "{branch}: {fast}, {standard}, {best}");
    }
}

/// Of a model that computes what another does, with a few channels that its norms make larger and the weights behind them
/// smaller again, as `scripts/make-outliers` makes them.
#[test]
fn outliers_that_norms_make_cost_nothing() {
    let lab = Lab::new();
    let plain = lab.quantize(&["--variant", "4bit-32g"]).succeeds();
    assert!(!plain.stderr.contains("equalized with"), "{}", plain.stderr);
    let kl = |folder: &str| {
        let evaluation = lab.eval(&[&lab.path(folder).join("gptq-4bit-32g-actorder_False")]);
        evaluation["models"][0]["kl_divergence"]["value"].as_f64().unwrap()
    };
    let plain = kl("out");
    safetensors_file::change(&lab.model(), |tensors| {
        for (name, tensor) in tensors {
            let factor = match name {
                _ if name.contains("model.layers") && name.ends_with("layernorm.weight") => 64.0,
                _ if ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
                    .iter()
                    .any(|n| name.contains(n)) =>
                {
                    1.0 / 64.0
                }
                _ => continue,
            };
            let width = *tensor.shape.last().unwrap();
            let values = tensor.halves();
            for channel in [5, 40] {
                for at in (channel..values.len()).step_by(width) {
                    tensor.fill([at], values[at].to_f32() * factor);
                }
            }
        }
    });
    let with = |folder: &str, flags: &[&str]| {
        let out = text_of(&lab.path(folder));
        lab.quantize(&[&["--variant", "4bit-32g", "--out", &out], flags].concat()).succeeds().stderr
    };
    let said = with("equalized", &[]);
    assert!(said.contains("8 outlier channels of 4 norms are equalized with the linears behind"), "{said}");
    with("left", &["--equalize", "false"]);
    let [equalized, left] = ["equalized", "left"].map(kl);
    assert!(equalized < 1.2 * plain && left > 1.5 * plain, "{plain} {equalized} {left}");
    let branch = lab.path("equalized/gptq-4bit-32g-actorder_False");
    let against = ["--against", &text_of(&lab.model()), "--json"];
    assert!(lab.verify(&branch, &against).json()["distances"].as_array().unwrap().len() == 14);
}
