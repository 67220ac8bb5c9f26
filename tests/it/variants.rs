//! Every kind of variant and every kind of source, from quantize through verify to eval.

use safetensors::Dtype;
use serde_json::Value;

use crate::{
    helpers::{Lab, entries, read_json, text_of},
    safetensors_file,
    tiny_model::Model,
};

/// All widths, all orders, both grids, whole groups, partial last groups, one group a row.
const VARIANTS: [&str; 14] = [
    "2bit-16g-act-asym",
    "2bit-32g",
    "3bit-32g",
    "3bit-48g-act",
    "3bit--1g-asym",
    "4bit-16g-asym",
    "4bit-32g",
    "4bit-32g-act",
    "4bit-48g",
    "4bit-48g-act-asym",
    "4bit-48g-static",
    "4bit--1g-act",
    "8bit-64g-static-asym",
    "8bit--1g",
];

#[test]
fn every_variant_goes_from_quantize_to_eval() {
    let lab = Lab::new();
    let flags: Vec<&str> = VARIANTS.iter().flat_map(|variant| ["--variant", variant]).collect();
    let report = lab.quantize(&[&flags[..], &["--json"]].concat()).json();
    let branches = report["branches"].as_array().unwrap();
    assert_eq!(branches.len(), VARIANTS.len());
    let folders: Vec<_> = branches.iter().map(|b| lab.out().join(b["branch"].as_str().unwrap())).collect();
    let source = text_of(&lab.model());
    for (variant, folder) in VARIANTS.iter().zip(&folders) {
        let output = lab.verify(folder, &["--against", &source]);
        assert_eq!(output.code, Some(0), "{variant}: {}{}", output.stdout, output.stderr);
    }
    let evaluation = lab.eval(&folders.iter().map(|f| f.as_path()).collect::<Vec<_>>());
    // What a variant costs follows from its bits, by far more than from anything else.
    let mut worst: [f64; 9] = [0.0; 9];
    let mut best = [f64::INFINITY; 9];
    for (variant, model) in VARIANTS.iter().zip(evaluation["models"].as_array().unwrap()) {
        let bits = variant[..1].parse::<usize>().unwrap();
        let divergence = model["kl_divergence"]["value"].as_f64().unwrap();
        worst[bits] = worst[bits].max(divergence);
        best[bits] = best[bits].min(divergence);
    }
    for (more, fewer) in [(8, 4), (4, 3), (3, 2)] {
        assert!(
            worst[more] < best[fewer],
            "KL at {more} bits {}, at {fewer} bits {}",
            worst[more],
            best[fewer]
        );
    }
}

/// Mean relative output error of a run's only branch.
fn mean_error(report: &Value) -> f64 {
    let linears = report["branches"][0]["linears"].as_array().unwrap();
    linears.iter().map(|l| l["relative_error"].as_f64().unwrap()).sum::<f64>() / linears.len() as f64
}

#[test]
fn every_kind_of_source_is_read() {
    let sources = [
        Model { dtype: Dtype::BF16, ..Model::default() },
        Model { dtype: Dtype::F32, ..Model::default() },
        Model { heads: 4, kv_heads: 2, ..Model::default() },
        Model { tied: true, ..Model::default() },
        Model { biases: true, ..Model::default() },
        Model {
            heads: 4,
            kv_heads: 1,
            hidden: 96,
            dtype: Dtype::F32,
            tied: true,
            biases: true,
            ..Model::default()
        },
    ];
    for model in sources {
        let lab = Lab::with(&model);
        let report = lab.quantize(&["--variant", "4bit-32g-act", "--json"]).json();
        assert!(mean_error(&report) < 0.2, "{model:?}: {}", mean_error(&report));
        lab.verify(&lab.branch(), &["--against", &text_of(&lab.model())]).succeeds();
        let tensors = safetensors_file::read_folder(&lab.branch());
        assert_eq!(tensors.contains_key("lm_head.weight"), !model.tied, "{model:?}");
        assert_eq!(tensors.contains_key("model.layers.0.mlp.up_proj.bias"), model.biases, "{model:?}");
        assert!(tensors.values().all(|t| matches!(t.dtype, Dtype::F16 | Dtype::I32)), "{model:?}");
        assert_eq!(read_json(&lab.branch().join("config.json"))["torch_dtype"], "float16", "{model:?}");
        let evaluation = lab.eval(&[&lab.branch()]);
        let divergence = evaluation["models"][0]["kl_divergence"]["value"].as_f64().unwrap();
        assert!(divergence > 0.0 && divergence < 0.5, "{model:?}: {divergence}");
    }
}

#[test]
fn a_sharded_source_gives_the_same_branch() {
    let lab = Lab::with_branch("4bit-32g-act");
    let sharded = Lab::empty();
    Model::default().write_sharded(&sharded.model());
    sharded.quantize(&["--variant", "4bit-32g-act"]).succeeds();
    assert!(safetensors_file::read_folder(&sharded.branch()) == safetensors_file::read_folder(&lab.branch()));
}

/// Both ways of making Hessians in one place: they must differ, and the shared one must not be much worse.
#[test]
fn shared_hessians_are_another_way_to_nearly_the_same() {
    let lab = Lab::new();
    let flags = ["--variant", "4bit-32g-act", "--variant", "4bit-32g", "--json"];
    let each = lab.quantize(&flags).json();
    let out = text_of(&lab.path("shared"));
    let shared = lab.quantize(&[&flags[..], &["--shared-hessian", "--out", &out]].concat()).json();
    assert_eq!(entries(&lab.out()), entries(&lab.path("shared")));
    for branch in ["gptq-4bit-32g-actorder_True", "gptq-4bit-32g-actorder_False"] {
        let [one, other] =
            [lab.out(), lab.path("shared")].map(|out| safetensors_file::read_folder(&out.join(branch)));
        // The first stage sees no quantized weight before it in either.
        for suffix in ["qweight", "scales"] {
            let name = format!("model.layers.0.self_attn.k_proj.{suffix}");
            assert!(one[&name] == other[&name], "{branch}: {name}");
        }
        let last = "model.layers.1.mlp.down_proj.qweight";
        assert!(one[last] != other[last], "{branch}");
        let said = read_json(&lab.path("shared").join(branch).join("quantize_config.json"));
        assert_eq!(said["true_sequential"], false);
        lab.verify(&lab.path("shared").join(branch), &["--against", &text_of(&lab.model())]).succeeds();
    }
    let (each, shared) = (mean_error(&each), mean_error(&shared));
    assert!((shared / each - 1.0).abs() < 0.2, "{each} and {shared}");
}
