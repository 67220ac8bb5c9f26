//! Whole safetensors files in memory, by the format's own crate: to make, break and compare them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// All tensors of a checkpoint.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    /// `values` as F16, BF16 or F32.
    pub(crate) fn floats(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        let bytes = match dtype {
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            other => panic!("no floats of {other:?} are needed"),
        };
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    /// The values of an I32 tensor.
    pub(crate) fn words(&self) -> Vec<i32> {
        assert_eq!(self.dtype, Dtype::I32);
        self.bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
    }

    /// The values of an F16 tensor.
    pub(crate) fn halves(&self) -> Vec<f16> {
        assert_eq!(self.dtype, Dtype::F16);
        self.bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect()
    }

    /// The values of an F32 tensor.
    pub(crate) fn singles(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    /// Changes the values of an I32 tensor.
    pub(crate) fn change_words(&mut self, change: impl FnOnce(&mut [i32])) {
        let mut words = self.words();
        change(&mut words);
        self.bytes = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    }

    /// Fills elements `at` of a floating-point tensor with `value`.
    pub(crate) fn fill(&mut self, at: impl IntoIterator<Item = usize>, value: f32) {
        let element = Self::floats(self.dtype, &[1], &[value]).bytes;
        for index in at {
            self.bytes[index * element.len()..][..element.len()].copy_from_slice(&element);
        }
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Reads one file.
pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| {
        (name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// Reads all weight files of a checkpoint folder.
pub(crate) fn read_folder(dir: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for file in weight_files(dir) {
        tensors.extend(read(&file));
    }
    tensors
}

/// The weight files of a checkpoint folder, sorted.
pub(crate) fn weight_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files
}

/// Writes one file.
pub(crate) fn write(path: &Path, tensors: &Tensors) {
    let views =
        tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Reads `model.safetensors` in `dir`, changes its tensors and writes it back.
pub(crate) fn change(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let mut tensors = read(&path);
    change(&mut tensors);
    write(&path, &tensors);
}
